-- title: Hall of Fame: members by decade of their election
-- chart: bar
-- x: decade
-- y: members
select
    (yearid // 10 * 10)::varchar || 's' as decade,
    count(*)::integer as members,
    count(*) filter (category = 'Player')::integer as players,
    count(*) filter (votedBy = 'BBWAA')::integer as elected_by_writers,
from hall_of_fame
where inducted = 'Y'
group by decade
order by decade
