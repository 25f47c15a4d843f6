-- What happens on the next day: 40 customers move, 100 orders are shipped, 10 removed and 50 made, 1,000 events come.
begin;
update customers set city = 'Bern' where id % 10 = 1 and id <= 400;
update orders set status = 'shipped', updated_at = timestamptz '2026-03-02 08:00+00' where id between 101 and 200;
delete from orders where id between 1 and 10;
insert into orders
select i, i % 500 + 1, 20, 'open', timestamptz '2026-03-02 09:00+00' from generate_series(5001, 5050) as i;
insert into events (order_id, kind, at)
select i, 'seen', timestamptz '2026-03-02 10:00+00' from generate_series(1001, 2000) as i;
commit;
