-- title: Best products
-- chart: bar
-- x: name
-- y: sold
select p.sku, p.name, p.category, sum(o.quantity)::bigint as sold
from orders as o
join products as p using (sku)
group by all
order by sold desc, sku
limit 10
