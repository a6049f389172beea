"""What Qlib calls: KronosModel, Kronos' factors, simple rules, ForecastRecord.

`qrun` makes a `model.KronosModel` from a workflow file, checked by `settings`. Its `fit` runs a `training_job`, its
`predict` a `forecast_job`; `neutralise` takes simple factors out of the scores, and `recording` writes to Qlib's
recorder. `kronos_factors` gives what Kronos makes of windows to other models, hidden states by way of a `projection`;
`factor_table` writes it to a file. `rules` are scores of one Qlib expression, `records.ForecastRecord` measures
forecasts against actual bars, and `finetune` runs the training of a workflow alone, for `kronos-qlib finetune`. `check`
reads a workflow before it runs, `new_workflow` writes one for a store, `tuning` chooses its settings, and `rolling`
trains it anew every so many sessions; `training_folder` says where a training goes and which one it starts from.
"""
