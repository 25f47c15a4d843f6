-- title: Spectators per home game
-- chart: line
-- x: season
-- y: spectators_per_game
select
    yearID::integer as season,
    round(sum(attendance) / sum(Ghome))::integer as spectators_per_game,
    sum(attendance)::bigint as spectators,
from teams
-- Only teams of which both are known: the early seasons have few.
where attendance > 0 and Ghome > 0
group by season
order by season
