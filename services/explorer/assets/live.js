// Keeps the counters current. The page says the same without it.
(() => {
  const counters = document.querySelector("[data-live]");
  const news = document.querySelector("[data-news]");
  if (!counters) return;
  const grouped = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f");
  const infer = (micro) => `${grouped(Math.floor(micro / 1e6))}.${String(micro % 1e6).padStart(6, "0")}`;
  let first = null;
  const update = async () => {
    if (document.hidden) return;
    try {
      const response = await fetch(counters.dataset.live);
      if (!response.ok) return;
      const stats = await response.json();
      for (const place of counters.querySelectorAll("[data-stat]")) {
        const value = stats[place.dataset.stat];
        place.textContent = place.dataset.stat === "charged_micro" ? infer(value) : grouped(value);
      }
      first ??= stats.receipts;
      const more = stats.receipts - first;
      if (news && more > 0) {
        news.textContent = more === 1 ? "1 new receipt" : `${more} new receipts`;
        news.hidden = false;
      }
    } catch {
      // The network may be away for a moment; the next tick tries again.
    }
  };
  update();
  setInterval(update, 5000);
})();
