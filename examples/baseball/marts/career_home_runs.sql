-- title: Career home runs
-- chart: bar
-- x: player
-- y: home_runs
select player, home_runs, games, first_season, last_season
from player_careers
order by home_runs desc, player
limit 25
