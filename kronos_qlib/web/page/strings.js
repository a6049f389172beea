// All that the page says, in English and Chinese. What the server says of bars and models is in English.
const STRINGS = {
  en: {
    skip: "To the content", tabs: "Parts of the page", tabForecast: "Forecast", tabMarket: "Market", tabRuns: "Runs", tabLedger: "Ledger", tabData: "Data",
    theme: "Theme", themeAuto: "Auto", themeLight: "Light", themeDark: "Dark", language: "Language", question: "What to compute",
    source: "Store or file", store: "Store", instrument: "Instrument", drop: "Or drop a CSV or Parquet file of bars here", at: "From the last bar up to", atNote: "Empty: the last bar. An earlier date also shows what came.",
    model: "Model", lookback: "Lookback, bars", horizon: "Horizon, bars", samples: "Sample paths", seed: "Seed", temperature: "Temperature", topP: "Top-p", topK: "Top-k (0: all)",
    ask: "Forecast", cancel: "Cancel", progress: "Progress", show: "Show", showPaths: "paths", bollinger: "Bollinger 20, 2σ", redUp: "red is up", chart: "Candles, volume, bands of the forecast and what came",
    downloadCsv: "CSV", downloadPng: "PNG", copySnippet: "Copy the Python code", copied: "Copied.", eachBar: "Each bar", snippet: "Python that repeats this forecast, to the digit",
    queued: "Waiting; {0} before it.", running: "Sampling …", done: "Done in {0} s.", known: "Answered before; shown at once.", cancelled: "Cancelled.", failed: "Failed.", noAnswer: "The server does not answer.",
    probUp: "Probability up", probUpNote: "close of bar {0} above the last", expected: "Expected return", expectedNote: "median at bar {0}", rangeNote: "return to bar {0}", range50: "Half of the paths", range90: "90 % of the paths",
    came: "What came", cameNote: "{0} bars later", error: "Mean error of the close", errorNote: "last value {0}", coverage: "In the bands, 50 / 90 %", coverageNote: "historical volatility {0}", crps: "CRPS", crpsNote: "last value {0}, volatility {1}",
    bars: "bars", median: "median", band50: "50 % of the paths", band90: "90 % of the paths", paths: "paths", whatCame: "what came", price: "price", volume: "volume", time: "time", up: "up", low: "low", high: "high",
    finishedRuns: "Finished runs", ownList: "watchlist", noWatchlist: "The watchlist is empty: tick instruments of a ranking first.", kept: "In the ledger: set {0}, {1}.", universe: "Universe", date: "Date", top: "Marked (top-k)", rank: "Rank", filter: "Filter", watchedOnly: "watchlist only", watch: "Watch {0}", score: "Mean return", ownScore: "Score", lastClose: "Last close", recent: "Recent closes", leftOut: "Left out",
    ranked: "{0} instruments on {1}, by {2}.", inMarket: "#",
    compare: "Compare", experiment: "Experiment", started: "Started", recorder: "Recorder", chooseRuns: "Choose at least one run.", report: "Comparison report", openReport: "Open the report alone", choose: "Choose",
    record: "The record", updateRecord: "Fill in what came, and judge", filled: "{0} values filled in; {1} rows still wait.", paperExcess: "Paper portfolio, excess", paperCost: "Its costs", savedForecasts: "Saved forecasts", kind: "Kind", dates: "Dates", days: "Days", rankIc: "Rank IC", made: "Made", live: "live", simulated: "simulated", instruments: "Instruments", arrived: "Came", openSet: "Open", emptyLedger: "The ledger has no forecasts yet.",
    uploads: "Files", stores: "Stores", noUploads: "No files yet.", firstBar: "First bar", lastBar: "Last bar", barsHeld: "Bars", rejected: "Rows that are no bars", line: "line", reason: "reason", remove: "Remove", use: "Forecast", check: "Check", checkFile: "What ingest finds", ingested: "What ingest makes of {0}", uploading: "Uploading …", uploaded: "{0}: {1} bars of {2} instruments.",
    universes: "Universes", subject: "Subject", finding: "Finding", level: "Level", examples: "Examples", checked: "{0}: {1} errors.",
    tokenTitle: "This server asks for its token", token: "Token", enter: "Enter", tooBig: "The file is larger than {0} MB, the most here.",
  },
  zh: {
    skip: "跳到内容", tabs: "页面各部分", tabForecast: "预测", tabMarket: "市场", tabRuns: "实验", tabLedger: "台账", tabData: "数据",
    theme: "主题", themeAuto: "自动", themeLight: "浅色", themeDark: "深色", language: "语言", question: "计算设置",
    source: "数据库或文件", store: "数据库", instrument: "标的", drop: "或将 CSV、Parquet 行情文件拖到这里", at: "截止到", atNote: "留空：最新一根 K 线。选较早日期会同时显示实际走势。",
    model: "模型", lookback: "回看（根）", horizon: "预测（根）", samples: "采样路径数", seed: "随机种子", temperature: "温度", topP: "Top-p", topK: "Top-k（0：全部）",
    ask: "预测", cancel: "取消", progress: "进度", show: "显示", showPaths: "路径", bollinger: "布林带 20, 2σ", redUp: "红涨绿跌", chart: "K 线、成交量、预测区间与实际走势",
    downloadCsv: "CSV", downloadPng: "PNG", copySnippet: "复制 Python 代码", copied: "已复制。", eachBar: "逐根数据", snippet: "可逐位复现此预测的 Python 代码",
    queued: "排队中，前面还有 {0} 个。", running: "采样中……", done: "完成，用时 {0} 秒。", known: "此前已回答，直接显示。", cancelled: "已取消。", failed: "失败。", noAnswer: "服务器没有响应。",
    probUp: "上涨概率", probUpNote: "第 {0} 根收盘高于最新收盘", expected: "预期收益", expectedNote: "第 {0} 根的中位数", rangeNote: "到第 {0} 根的收益", range50: "半数路径", range90: "90 % 的路径",
    came: "实际", cameNote: "{0} 根之后", error: "收盘平均误差", errorNote: "最新价基准 {0}", coverage: "落入区间 50 / 90 %", coverageNote: "历史波动率 {0}", crps: "CRPS", crpsNote: "最新价 {0}，波动率 {1}",
    bars: "K 线", median: "中位数", band50: "50 % 的路径", band90: "90 % 的路径", paths: "路径", whatCame: "实际走势", price: "价格", volume: "成交量", time: "时间", up: "上涨", low: "最低", high: "最高",
    finishedRuns: "已完成的实验", ownList: "自选", noWatchlist: "自选为空：请先在排名中勾选标的。", kept: "已记入台账：第 {0} 组，{1}。", universe: "股票池", date: "日期", top: "标记前 k 名", rank: "排名", filter: "筛选", watchedOnly: "仅自选", watch: "自选 {0}", score: "平均收益", ownScore: "得分", lastClose: "最新收盘", recent: "近期收盘", leftOut: "未计入",
    ranked: "{1} 共 {0} 个标的，模型 {2}。", inMarket: "#",
    compare: "比较", experiment: "实验", started: "开始", recorder: "记录", chooseRuns: "请至少选择一个实验。", report: "比较报告", openReport: "单独打开报告", choose: "选择",
    record: "记录", updateRecord: "补充实际结果并评估", filled: "已补充 {0} 个数值，还有 {1} 行在等待。", paperExcess: "模拟组合超额", paperCost: "其成本", savedForecasts: "已保存的预测", kind: "类型", dates: "日期数", days: "天数", rankIc: "Rank IC", made: "生成时间", live: "实盘", simulated: "模拟", instruments: "标的数", arrived: "已实现", openSet: "打开", emptyLedger: "台账中还没有预测。",
    uploads: "文件", stores: "数据库", noUploads: "还没有文件。", firstBar: "首根", lastBar: "末根", barsHeld: "K 线数", rejected: "不是 K 线的行", line: "行", reason: "原因", remove: "删除", use: "预测", check: "检查", checkFile: "查看导入结果", ingested: "{0} 的导入结果", uploading: "上传中……", uploaded: "{0}：{2} 个标的，{1} 根 K 线。",
    universes: "股票池", subject: "项目", finding: "结果", level: "级别", examples: "例子", checked: "{0}：{1} 个错误。",
    tokenTitle: "此服务器需要令牌", token: "令牌", enter: "确定", tooBig: "文件超过 {0} MB 的上限。",
  },
};

export const language = () => document.documentElement.lang === "zh" ? "zh" : "en";
export const text = (key, ...values) => (STRINGS[language()][key] ?? key).replace(/\{(\d)\}/g, (_, place) => values[place]);

// Write the texts of all elements that name one.
export function writeTexts(root = document) {
  for (const each of root.querySelectorAll("[data-text]")) each.textContent = text(each.dataset.text);
  for (const each of root.querySelectorAll("[data-label]")) each.setAttribute("aria-label", text(each.dataset.label));
}
