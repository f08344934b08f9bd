"""Rows to a table, a plot and a stand-alone HTML page.

`table` has columns and formatters, `figures` the look of plots, `page` the page and the files a command leaves. `compare`,
`bench` and `plan` each say what the report of their command shows: its columns, its figure, its captions. Under `compare`,
`groups` gathers rows into runs, `sooner` and `paired` hold them against dense, `runs` sums up, `captions` and `plots` say
and draw it.
Importing any of it imports neither rich nor matplotlib: they come with the first table or figure, and with
`pip install "strassen-tile[report]"`.
"""
