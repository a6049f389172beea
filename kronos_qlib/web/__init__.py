"""The page and its API: what `kronos-qlib serve` and `kronos-qlib mcp` offer. It computes nothing itself.

`settings` says what was named at start; `sources` finds bars by these names, `networks` keeps the networks, `uploads`
the files that users brought. `forecasts` answers a question with the predictor that the commands use, `market` ranks a
universe, `records` reads ledger and runs; `jobs` has one thread answer what waits, and `service` puts these together.
`app` is the API, `safety` what every request passes, `page/` the page; `tools` offers the same to assistants.
"""
