-- The shop as it is on the first day. It makes its tables anew.
begin;
drop table if exists events, orders, customers;
create table customers (id integer primary key, name text not null, city text not null);
create table orders (
    id integer primary key,
    customer integer not null references customers,
    amount numeric(10, 2) not null,
    status text not null,
    updated_at timestamptz not null
);
create table events (id bigint generated always as identity primary key, order_id integer, kind text, at timestamptz);

insert into customers
select i, 'Customer ' || i, (array['Bern', 'Graz', 'Lyon', 'Oslo', 'Porto'])[i % 5 + 1] from generate_series(1, 500) as i;

insert into orders
select i, i % 500 + 1, (i % 90 + 10) * 1.25, (array['open', 'paid', 'shipped'])[i % 3 + 1],
    timestamptz '2026-03-01 00:00+00' + i * interval '10 seconds'
from generate_series(1, 5000) as i;

insert into events (order_id, kind, at)
select i % 5000 + 1, 'seen', timestamptz '2026-03-01 00:00+00' + i * interval '2 seconds' from generate_series(1, 20000) as i;
commit;
