// Before the first paint: the theme and language that the reader chose last, where they are kept.
{
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
  const kept = name => { try { return localStorage.getItem(name); } catch { return null; } };
  const paint = () => {
    const chosen = root.dataset.chosen;
    root.dataset.theme = chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
  };
  root.dataset.chosen = kept("theme") || "auto";
  root.lang = kept("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
  paint();
  dark.addEventListener("change", paint);
  root.addEventListener("themechange", paint);
}
