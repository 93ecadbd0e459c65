"""The plot of `make bench-node`: tokens per second of the three, as an SVG of the style of docs/src/request.svg."""
SIDES = (("llama", "llama.cpp", "c"), ("exact", "exact", "n"), ("fast", "fast", "s"))
STYLE = (".bg{fill:#fff}rect{stroke-width:1.5}.s{fill:#eef2ff;stroke:#6366f1}.n{fill:#ecfdf5;stroke:#059669}"
         ".c{fill:#f8fafc;stroke:#64748b}.t{font-size:15px;font-weight:600;fill:#0f172a}"
         ".u{font-size:10.5px;text-anchor:middle;fill:#475569}.l{font-size:11.5px;fill:#334155}"
         ".m{text-anchor:middle}.a{stroke:#475569;stroke-width:1.5}")
WIDTH, HEIGHT, BASE, TOP = 960, 380, 320, 90
BAR, GAP = 34, 26


def draw(rows, settings):
    """`rows` as in bench-node.json; reading and decoding have scales of their own."""
    by_name = {row["metric"]: row for row in rows}

    def values(metric):
        exact, fast = by_name[f"exact_{metric}"], by_name[f"fast_{metric}"]
        return {"llama": fast["baseline"], "exact": exact["value"], "fast": fast["value"]}

    reading = [(f"{settings['PREFILL']} tokens", values(f"prefill_{settings['PREFILL']}"))]
    decoding = [(f"{n} sequence{'s' if n > 1 else ''}", values(f"decode_b{n}")) for n in settings["SEQUENCES"]]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" role="img" '
        f'aria-label="Tokens per second of llama.cpp and of the engine\'s classes exact and fast">',
        f"<style>{STYLE}</style>",
        f'<rect class="bg" x="0" y="0" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        f'<text class="l" x="20" y="28">Tokens per second with {settings["THREADS"]} threads, rounds: {settings["ROUNDS"]} (medians). '
        "Each side has its own scale.</text>",
    ]
    for i, (_, title, kind) in enumerate(SIDES):
        x = 640 + i * 100
        out.append(f'<rect class="{kind}" x="{x}" y="17" width="14" height="14" rx="3"/><text class="l" x="{x + 20}" y="28">{title}</text>')
    group = len(SIDES) * BAR + GAP
    # The bars shrink where there are more groups than fit.
    scale = min(1.0, (WIDTH - 60 - GAP) / ((1 + len(decoding)) * group + 2 * GAP))
    out += panel("reading a prompt", reading, 20, scale)
    out += panel("decoding", decoding, 20 + (group + 2 * GAP) * scale, scale)
    return "\n".join([*out, "</svg>"]) + "\n"


def panel(title, groups, left, scale):
    bar, step = BAR * scale, (len(SIDES) * BAR + GAP) * scale
    most = max(value for _, sides in groups for value in sides.values())
    right = left + len(groups) * step
    yield f'<text class="t" x="{left:.1f}" y="62">{title}</text>'
    for i, (name, sides) in enumerate(groups):
        x = left + i * step
        for j, (side, _, kind) in enumerate(SIDES):
            height = (BASE - TOP) * sides[side] / most
            at = x + j * bar
            yield f'<rect class="{kind}" x="{at:.1f}" y="{BASE - height:.1f}" width="{bar - 4:.1f}" height="{height:.1f}" rx="3"/>'
            yield f'<text class="u" x="{at + bar / 2 - 2:.1f}" y="{BASE - height - 5:.1f}">{sides[side]:.0f}</text>'
        yield f'<text class="l m" x="{x + len(SIDES) * bar / 2 - 2:.1f}" y="{BASE + 20}">{name}</text>'
    yield f'<path class="a" d="M{left - 4:.1f} {BASE} L{right - GAP * scale + 4:.1f} {BASE}"/>'
