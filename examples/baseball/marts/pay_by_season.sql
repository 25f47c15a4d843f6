-- title: Median salary of a player
-- chart: line
-- x: season
-- y: median_salary_usd
select
    yearID::integer as season,
    median(salary)::bigint as median_salary_usd,
    max(salary)::bigint as highest_salary_usd,
    count(*)::integer as players,
from salaries
where salary > 0
group by season
order by season
