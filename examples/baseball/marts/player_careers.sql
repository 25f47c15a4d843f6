-- title: Hits and home runs over a career
-- chart: scatter
-- x: hits
-- y: home_runs
select
    playerID,
    concat_ws(' ', nameFirst, nameLast) as player,
    min(yearID)::integer as first_season,
    max(yearID)::integer as last_season,
    sum(G)::integer as games,
    sum(AB)::integer as at_bats,
    sum(H)::integer as hits,
    sum(HR)::integer as home_runs,
from batting
join people using (playerID)
group by all
order by hits desc, playerID
