// Overlays of a chart, of closes alone. Null where too few bars are known.
export function average(values, length) {
  return values.map((_, end) => end + 1 < length ? null : values.slice(end + 1 - length, end + 1).reduce((sum, value) => sum + value, 0) / length);
}

export function bollinger(values, length = 20, width = 2) {
  const middle = average(values, length);
  const spread = middle.map((mean, end) => mean === null ? null : Math.sqrt(values.slice(end + 1 - length, end + 1).reduce((sum, value) => sum + (value - mean) ** 2, 0) / length));
  return [-width, width].map(times => middle.map((mean, place) => mean === null ? null : mean + times * spread[place]));
}

// Wilder's relative strength index.
export function rsi(values, length = 14) {
  const found = values.map(() => null);
  let gain = 0, loss = 0;
  for (let place = 1; place < values.length; place++) {
    const step = values[place] - values[place - 1], weight = 1 / length, keep = place <= length ? 1 : 1 - 1 / length;
    gain = gain * keep + Math.max(step, 0) * weight;
    loss = loss * keep + Math.max(-step, 0) * weight;
    if (place >= length) found[place] = gain + loss === 0 ? 50 : 100 * gain / (gain + loss);
  }
  return found;
}
