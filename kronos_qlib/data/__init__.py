"""From a Qlib store to windows of bars.

The way of the bars through the files:

1. `loader` reads a store: one table of open, high, low, close, volume, amount and label. `factors` reads simple factors
   of the same store.
2. `handler` is Qlib's data handler on that table; it keeps the valid bars as one array (`Bars`) with the mask of
   members, after `checks` has looked for what no market prints.
3. `dataset` is Qlib's dataset: it selects the windows of a segment by their score dates.
4. `windows` holds windows as positions in the array of bars; it copies them out and normalises them batch by batch.
5. For training, `extra` adds the windows of other universes and stores, `join_windows` makes one set of them all, and
   `windows_on_disk` shares it among processes.

Beside them: `calendar` knows the sessions that follow a date, `stamps` the time stamps that the networks embed, `dates`
the dates of workflow files; `demo_market` writes a synthetic store.

`windows`, `join_windows` and `windows_on_disk` import neither pandas nor Qlib: the processes that train and forecast
map their windows from disk and stay small. So whatever needs pandas is apart from them, stamps and dates too: they are
made once, in the process that has Qlib, and reach the others as arrays.

Shapes: N bars, I instruments, W windows, B windows of a batch, L lookback, P horizon, T = L + the bars after it in a
window, D columns of a bar (`windows.COLUMNS`, and those that a handler adds).
"""
