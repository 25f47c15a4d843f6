-- title: Customers who moved
-- chart: bar
-- x: moved_to
-- y: customers
select past.city as moved_from, present.city as moved_to, count(*) as customers
from customers as past
join customers as present on present.id = past.id and present.valid_from = past.valid_to
where present.city <> past.city
group by all
order by all
