//! The graph of the models that ship, as people see it.

use std::collections::BTreeSet;

use simulacro_core::models::{At, mermaid, svg, text};

use crate::{
    models::project,
    shop::{day, now},
};

#[test]
fn the_graph_is_drawn_as_text_as_mermaid_and_as_svg() {
    let project = project();
    insta::assert_snapshot!("text", text(&project));
    insta::assert_snapshot!("mermaid", mermaid(&project));
    let svg = svg(&project);
    assert_eq!(svg.matches("<rect").count(), 14 + 4, "fourteen models and four sources");
    assert_eq!(svg.matches("<path").count(), 17, "one line for each reference");
    assert_eq!(svg.matches("<g>").count(), svg.matches("</g>").count());
}

#[test]
fn a_model_is_explained_with_its_readers_and_its_sql() {
    let absent = BTreeSet::new();
    let at = At { day: day("2024-03-01"), now: now(), version: "1.2.3", absent: &absent };
    insta::assert_snapshot!("explained", project().explain("metricas_diarias", &at).expect("it ships"));
    assert_eq!(project().explain("metricas", &at), None);
}
