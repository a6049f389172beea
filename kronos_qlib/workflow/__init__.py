"""What Qlib calls: KronosModel, simple rules, ForecastRecord.

`qrun` makes a `model.KronosModel` from a workflow file, checked by `settings`. Its `fit` runs a `training_job`, its
`predict` a `forecast_job`; `neutralise` takes simple factors out of the scores, and `recording` says what Qlib's
recorder gets. `rules` are scores of one Qlib expression, `records.ForecastRecord` measures forecasts against the bars
that came, and `finetune` runs the training of a workflow alone, for `kronos-qlib finetune`.
"""
