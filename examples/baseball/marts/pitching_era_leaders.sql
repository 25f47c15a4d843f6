-- title: Lowest career earned run average (2,000 innings or more)
-- chart: bar
-- x: pitcher
-- y: earned_run_average
select
    any_value(concat_ws(' ', nameFirst, nameLast)) as pitcher,
    -- Three outs make an inning, nine innings a game.
    round(27.0 * sum(ER) / sum(IPouts), 3)::double as earned_run_average,
    (sum(IPouts) // 3)::integer as innings,
    min(yearID)::integer as first_season,
    max(yearID)::integer as last_season,
from pitching
join people using (playerID)
group by playerID
having innings >= 2000
order by earned_run_average, pitcher
limit 25
