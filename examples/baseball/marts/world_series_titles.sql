-- title: World Series titles
-- chart: bar
-- x: franchise
-- y: titles
select
    franchName as franchise,
    count(*)::integer as titles,
    max(yearID)::integer as last_title,
from teams
join teams_franchises using (franchID)
where WSWin = 'Y'
group by franchise
order by titles desc, franchise
