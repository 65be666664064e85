//! The graph of models, drawn: as text, as Mermaid and as SVG.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{Lookback, Materialization, Model, Need, Project};

fn kind(model: &Model) -> String {
    match (model.materialization, model.lookback) {
        (Materialization::View, _) => "view".into(),
        (Materialization::Day, Lookback::Days(0)) => "day".into(),
        (Materialization::Day, Lookback::Days(n)) => format!("day, reads {n} before"),
        (Materialization::Day, Lookback::All) => "day, reads all before".into(),
    }
}

/// One line per model in the order in which they are made: layer, name, how it exists, what it reads.
pub fn text(project: &Project) -> String {
    let rows: Vec<_> = project
        .models()
        .map(|m| {
            let needs = m.needs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            [m.layer.clone(), m.name.clone(), kind(m), needs]
        })
        .collect();
    let width = |i: usize| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let mut out = String::new();
    for [layer, name, kind, needs] in &rows {
        let [a, b, c] = widths;
        let _ = writeln!(out, "{layer:<a$}  {name:<b$}  {kind:<c$}  <- {needs}");
    }
    out
}

/// Every source and model in order, by its column in a drawing: sources in the first, a model right of all that it reads.
fn columns(project: &Project) -> Vec<Vec<Need>> {
    let mut depth: BTreeMap<Need, usize> = project.sources().into_iter().map(|s| (s, 0)).collect();
    for model in project.models() {
        let deepest = model.needs.iter().filter_map(|n| depth.get(n)).max().copied().unwrap_or(0);
        depth.insert(Need::Model(model.name.clone()), deepest + 1);
    }
    let mut out = vec![Vec::new(); depth.values().max().map_or(0, |d| d + 1)];
    for (need, column) in depth {
        out[column].push(need);
    }
    out
}

/// The graph as a Mermaid flowchart; sources are rounded, views are dashed.
pub fn mermaid(project: &Project) -> String {
    let id = |need: &Need| need.to_string().replace('.', "_");
    let mut out = String::from("flowchart LR\n");
    for source in project.sources() {
        let _ = writeln!(out, "  {}([{source}])", id(&source));
    }
    for model in project.models() {
        let _ = writeln!(out, "  {}[{}]", model.name, model.name);
    }
    for model in project.models() {
        for need in &model.needs {
            let _ = writeln!(out, "  {} --> {}", id(need), model.name);
        }
    }
    let views = project.models().filter(|m| m.materialization == Materialization::View).map(|m| m.name.as_str());
    let views = views.collect::<Vec<_>>().join(",");
    if !views.is_empty() {
        let _ = writeln!(out, "  classDef view stroke-dasharray: 4 4\n  class {views} view");
    }
    out
}

const BOX: (usize, usize) = (200, 32);
const GAP: (usize, usize) = (70, 18);

/// The graph as an SVG picture, complete in itself.
pub fn svg(project: &Project) -> String {
    let columns = columns(project);
    let rows = columns.iter().map(Vec::len).max().unwrap_or(0);
    let (width, height) = (columns.len() * (BOX.0 + GAP.0) + GAP.0, rows * (BOX.1 + GAP.1) + GAP.1);
    let mut places: BTreeMap<&Need, (usize, usize)> = BTreeMap::new();
    for (i, column) in columns.iter().enumerate() {
        let top = (height - column.len() * (BOX.1 + GAP.1) + GAP.1) / 2;
        for (j, need) in column.iter().enumerate() {
            places.insert(need, (GAP.0 + i * (BOX.0 + GAP.0), top + j * (BOX.1 + GAP.1)));
        }
    }
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <title>Models</title>\n"
    );
    for model in project.models() {
        let Some(&(x, y)) = places.get(&Need::Model(model.name.clone())) else { continue };
        for need in &model.needs {
            let Some(&(from_x, from_y)) = places.get(need) else { continue };
            let (x1, y1, y2) = (from_x + BOX.0, from_y + BOX.1 / 2, y + BOX.1 / 2);
            let middle = (x1 + x) / 2;
            let _ =
                writeln!(out, "<path d=\"M{x1} {y1}C{middle} {y1} {middle} {y2} {x} {y2}\" fill=\"none\" stroke=\"#8a8f98\"/>");
        }
    }
    for (need, (x, y)) in &places {
        let model = if let Need::Model(name) = need { project.model(name) } else { None };
        let (fill, radius, dash, about) = match model {
            None => ("#e8edf3", BOX.1 / 2, "", "source".to_owned()),
            Some(m) if m.materialization == Materialization::View => {
                ("#ffffff", 4, " stroke-dasharray=\"4 4\"", format!("{}: {}", kind(m), m.what))
            }
            Some(m) => ("#d9ead3", 4, "", format!("{}: {}", kind(m), m.what)),
        };
        let _ = writeln!(
            out,
            "<g><title>{}</title><rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" rx=\"{radius}\" fill=\"{fill}\" \
             stroke=\"#4a5058\"{dash}/><text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{need}</text></g>",
            about.replace('&', "&amp;").replace('<', "&lt;"),
            BOX.0,
            BOX.1,
            x + BOX.0 / 2,
            y + BOX.1 / 2 + 4,
        );
    }
    out.push_str("</svg>\n");
    out
}
