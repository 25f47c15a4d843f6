-- title: Team pay against wins
-- chart: scatter
-- x: pay_of_league_average
-- y: wins_per_162_games
-- Pay is divided by the mean of its season: money of 1985 and of 2016 cannot be compared otherwise.
with payrolls as (
    select yearID, teamID, sum(salary) as payroll
    from salaries
    group by all
)
select
    teams.yearID::integer as season,
    teams.name as team,
    round(payroll / avg(payroll) over (partition by teams.yearID), 3) as pay_of_league_average,
    round(162.0 * W / (W + L), 1)::double as wins_per_162_games,
    payroll::bigint as payroll_usd,
from payrolls
join teams using (yearID, teamID)
order by season, team
