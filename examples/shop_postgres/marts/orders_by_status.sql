-- title: Orders by status
-- chart: bar
-- x: status
-- y: amount
select status, count(*) as orders, sum(amount) as amount from orders group by status order by status
