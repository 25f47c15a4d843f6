-- title: Revenue by month
-- chart: bar
-- x: month
-- y: revenue
select strftime(o.ordered_on, '%Y-%m') as month, count(*) as orders, sum(o.quantity * p.price) as revenue
from orders as o
join products as p using (sku)
group by month
order by month
