// Before the first paint: the theme and language that the reader chose last.
{
  let theme = "auto", language = null;
  try {
    theme = localStorage.getItem("theme") || "auto";
    language = localStorage.getItem("language");
  } catch { /* no storage: the system's own */ }
  if (theme !== "auto") document.documentElement.dataset.theme = theme;
  document.documentElement.lang = language || (navigator.language.startsWith("zh") ? "zh" : "en");
}
