//! The ROC curves, as an SVG of the style of docs/src/request.svg.

use std::fmt::Write;

/// A detector: what honest answers and each attack's answers measure, higher is more suspicious.
pub struct Panel<'a> {
    pub title: &'a str,
    pub honest: Vec<f64>,
    pub attacks: Vec<(&'static str, Vec<f64>)>,
}

const COLOURS: [&str; 13] = [
    "#6366f1", "#059669", "#d97706", "#dc2626", "#0891b2", "#7c3aed", "#65a30d", "#db2777", "#475569",
    "#b45309", "#0d9488", "#1d4ed8", "#9f1239",
];
const SIDE: f64 = 320.0;
const TOP: f64 = 60.0;

/// Share of values at or above `limit`, in percent.
fn above(values: &[f64], limit: f64) -> f64 {
    100.0 * values.iter().filter(|v| **v >= limit).count() as f64 / values.len().max(1) as f64
}

/// Points (honest rejected, attack caught) over all limits.
fn curve(honest: &[f64], attack: &[f64]) -> Vec<(f64, f64)> {
    let mut limits: Vec<f64> = honest.iter().chain(attack).copied().collect();
    limits.sort_by(|a, b| b.total_cmp(a));
    limits.dedup();
    let step = limits.len().div_ceil(200).max(1);
    let mut points = vec![(0.0, 0.0)];
    points.extend(limits.iter().step_by(step).map(|limit| (above(honest, *limit), above(attack, *limit))));
    points.push((100.0, 100.0));
    points
}

pub fn roc(panels: &[Panel<'_>]) -> String {
    let width = 60.0 + panels.len() as f64 * (SIDE + 70.0) + 150.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} 440\" font-family=\"system-ui, sans-serif\" role=\"img\" \
         aria-label=\"Share of each attack's answers that is caught over the share of honest answers that is rejected\">\n\
         <style>.bg{{fill:#fff}}.f{{fill:none;stroke:#64748b;stroke-width:1}}.c{{fill:none;stroke-width:1.8}}.t{{font-size:13px;font-weight:600;fill:#0f172a}}\
         .l{{font-size:11px;fill:#334155}}</style>\n<rect class=\"bg\" x=\"0\" y=\"0\" width=\"{width:.0}\" height=\"440\" rx=\"10\"/>\n"
    );
    for (i, panel) in panels.iter().enumerate() {
        let left = 60.0 + i as f64 * (SIDE + 70.0);
        draw(&mut out, panel, left);
    }
    let left = 60.0 + panels.len() as f64 * (SIDE + 70.0);
    for (i, (name, _)) in panels.first().map(|p| &p.attacks[..]).unwrap_or_default().iter().enumerate() {
        let y = TOP + 10.0 + 20.0 * i as f64;
        let colour = COLOURS[i % COLOURS.len()];
        let _ = writeln!(
            out,
            "<path class=\"c\" stroke=\"{colour}\" d=\"M{left:.0} {y:.0}h18\"/><text class=\"l\" x=\"{:.0}\" y=\"{:.0}\">{name}</text>",
            left + 24.0,
            y + 4.0
        );
    }
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, panel: &Panel<'_>, left: f64) {
    let bottom = TOP + SIDE;
    let _ = writeln!(out, "<text class=\"t\" x=\"{left:.0}\" y=\"{:.0}\">{}</text>", TOP - 22.0, panel.title);
    let _ = writeln!(
        out,
        "<rect class=\"f\" x=\"{left:.0}\" y=\"{TOP:.0}\" width=\"{SIDE:.0}\" height=\"{SIDE:.0}\"/>"
    );
    for percent in [0, 50, 100] {
        let at = f64::from(percent) / 100.0 * SIDE;
        let _ = writeln!(
            out,
            "<text class=\"l\" x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{percent}</text>\
             <text class=\"l\" x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{percent}</text>",
            left + at,
            bottom + 16.0,
            left - 6.0,
            bottom - at + 4.0
        );
    }
    let _ = writeln!(
        out,
        "<text class=\"l\" x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\">honest answers rejected, %</text>\
         <text class=\"l\" x=\"{left:.0}\" y=\"{:.0}\">caught, %</text>",
        left + SIDE / 2.0,
        bottom + 34.0,
        TOP - 6.0
    );
    for (i, (_, attack)) in panel.attacks.iter().enumerate() {
        let place =
            |(x, y): (f64, f64)| format!("{:.1},{:.1}", left + x / 100.0 * SIDE, bottom - y / 100.0 * SIDE);
        let points: Vec<String> = curve(&panel.honest, attack).into_iter().map(place).collect();
        let _ = writeln!(
            out,
            "<polyline class=\"c\" stroke=\"{}\" points=\"{}\"/>",
            COLOURS[i % COLOURS.len()],
            points.join(" ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_perfect_detector_goes_through_the_corner_and_a_blind_one_along_the_diagonal() {
        let points = curve(&[0.0, 0.0], &[1.0, 2.0]);
        assert!(points.contains(&(0.0, 100.0)), "{points:?}");
        let points = curve(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]);
        assert!(points.iter().all(|(x, y)| x == y), "{points:?}");
    }
}
