"""The generation engine: normalised windows → sample paths. Knows neither pandas nor Qlib.

`generate` is the way of a forecast, from tokens of the context to bars; `teacher_forcing` reads windows in one pass.
`weights` prepares the networks, `attention` runs blocks with cached keys and values, `context` is what is remembered
between steps, `sampling` draws the tokens, and `cuda_graph` replays a whole window batch on a GPU.
"""
