-- title: Payroll of all teams by season
-- chart: line
-- x: season
-- y: payroll_millions
select yearID as season, round(sum(salary) / 1e6, 1) as payroll_millions
from salaries
group by yearID
order by yearID
