-- title: Home runs per team and game
-- chart: line
-- x: season
-- y: home_runs_per_game
select
    yearID::integer as season,
    round(sum(HR) / sum(G), 3)::double as home_runs_per_game,
    round(sum(SO) / sum(G), 3)::double as strikeouts_per_game,
    sum(HR)::integer as home_runs,
from teams
group by season
order by season
