//! Which models of a project are made and tested, chosen by name.
//!
//! `metricas_diarias` is that model, `+user_features` with all that it reads, `stg_clientes+` with all that read it, and
//! `all` every model. What is not chosen can still be read.

use std::collections::BTreeSet;

use super::{Materialization, Model, Need, Project};

/// A choice that names no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("select {found}: found no such model, expected all, or some of {known}, each with + before it for what it reads or after it \
         for what reads it{}", near.as_ref().map(|n| format!("; did you mean {n}?")).unwrap_or_default())]
pub struct SelectError {
    /// What was asked for.
    pub found: String,
    /// The names there are.
    pub known: String,
    /// The name that is most like it.
    pub near: Option<String>,
}

/// The word of `known` that is most like `word`; `None` when none is near.
///
/// Near means that at most a third of the letters (and one at least) were changed, left out, added or swapped.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = word.chars().count();
    known
        .into_iter()
        .map(|k| (distance(word, k), k))
        .filter(|(d, k)| *d <= (length.max(k.chars().count()) / 3).max(1))
        .min()
        .map(|(_, k)| k)
}

/// How many letters to change, leave out, add, or swap with the next, to get from one word to another.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.to_lowercase().chars().collect(), b.to_lowercase().chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let change = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = change.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

impl Project {
    /// The same project with only these models chosen; commas and spaces part the names.
    ///
    /// # Errors
    /// For a name that no model has, with the nearest that one has.
    pub fn select(&self, choice: &str) -> Result<Self, SelectError> {
        let mut chosen = BTreeSet::new();
        for word in choice.split([',', ' ']).filter(|w| !w.is_empty()) {
            if word == "all" {
                chosen.extend(self.models.keys().cloned());
                continue;
            }
            let (upstream, name) = word.strip_prefix('+').map_or((false, word), |n| (true, n));
            let (downstream, name) = name.strip_suffix('+').map_or((false, name), |n| (true, n));
            if self.model(name).is_none() {
                let known: Vec<&str> = self.models.keys().map(String::as_str).collect();
                let near = nearest(name, known.iter().copied()).map(str::to_owned);
                return Err(SelectError { found: name.into(), known: known.join(", "), near });
            }
            chosen.insert(name.to_owned());
            if upstream {
                self.follow(name, &mut chosen, |p, n| p.models[n].models_read().collect());
            }
            if downstream {
                self.follow(name, &mut chosen, |p, n| p.readers(&Need::Model(n.into())).iter().map(|m| m.name.clone()).collect());
            }
        }
        Ok(Self { chosen, ..self.clone() })
    }

    /// Adds everything that `next` leads to from `name`, step by step.
    fn follow(&self, name: &str, into: &mut BTreeSet<String>, next: impl Fn(&Self, &str) -> Vec<String>) {
        let (mut waiting, mut seen) = (vec![name.to_owned()], BTreeSet::new());
        while let Some(name) = waiting.pop() {
            for other in next(self, &name) {
                if seen.insert(other.clone()) {
                    waiting.push(other);
                }
            }
        }
        into.append(&mut seen);
    }

    /// Whether a model is made and tested.
    pub fn is_chosen(&self, name: &str) -> bool {
        self.chosen.contains(name)
    }

    /// The models that are made and tested, each after those that it reads.
    pub fn chosen(&self) -> impl Iterator<Item = &Model> {
        self.models().filter(|m| self.is_chosen(&m.name))
    }

    /// Folders of the tables that a run writes.
    pub fn tables(&self) -> impl Iterator<Item = &str> {
        self.chosen().filter(|m| m.materialization == Materialization::Day).map(|m| m.table.as_str())
    }

    /// The chosen models, and what they and their tests read through any number of others.
    pub(super) fn read(&self) -> impl Iterator<Item = &Model> {
        let mut names = self.chosen.clone();
        for name in &self.chosen {
            for model in std::iter::once(name.clone()).chain(self.models[name].models_tested()) {
                self.follow(&model, &mut names, |p, n| p.models[n].models_read().collect());
                names.insert(model);
            }
        }
        self.models().filter(move |m| names.contains(&m.name))
    }
}

impl Model {
    /// Names of the models that this one reads.
    fn models_read(&self) -> impl Iterator<Item = String> {
        self.needs.iter().filter_map(|n| if let Need::Model(name) = n { Some(name.clone()) } else { None })
    }

    /// Names of the models that its tests compare it with.
    fn models_tested(&self) -> impl Iterator<Item = String> {
        self.tests.iter().filter_map(|t| match &t.kind {
            super::TestKind::Relationships(_, to, _) => Some(to.clone()),
            super::TestKind::NotNull(_)
            | super::TestKind::Unique(..)
            | super::TestKind::AcceptedValues(..)
            | super::TestKind::NotNegative(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::shipped;

    fn chosen(choice: &str) -> Vec<String> {
        let project = shipped().expect("the models parse").select(choice).expect("all are there");
        project.chosen().map(|m| m.name.clone()).collect()
    }

    #[test]
    fn a_plus_brings_what_is_read_or_what_reads() {
        assert_eq!(chosen("metricas_diarias"), ["metricas_diarias"]);
        assert_eq!(chosen("+metricas_producto"), ["stg_ventas_validadas", "int_ventas_enriquecidas", "metricas_producto"]);
        assert_eq!(
            chosen("int_ventas_enriquecidas+"),
            ["int_ventas_enriquecidas", "metricas_diarias", "metricas_producto", "user_features"]
        );
        assert_eq!(chosen("stg_clientes, cohortes_usuario"), ["stg_clientes", "cohortes_usuario"]);
        assert_eq!(chosen("all").len(), shipped().expect("they parse").models().count());
    }

    #[test]
    fn a_name_that_no_model_has_is_told_with_the_nearest() {
        let project = shipped().expect("the models parse");
        let error = project.select("+metrica_diarias").expect_err("it is misspelt");
        assert_eq!(error.near.as_deref(), Some("metricas_diarias"));
        assert!(error.to_string().ends_with("did you mean metricas_diarias?"), "{error}");
        assert_eq!(project.select("nothing_like_it").expect_err("there is none").near, None);
    }

    #[test]
    fn a_run_of_one_model_needs_no_source_of_another() {
        let one = shipped().expect("they parse").select("metricas_producto").expect("it is there");
        assert_eq!(one.tables().collect::<Vec<_>>(), ["marts/metricas_producto"]);
        assert!(one.read().all(|m| m.optional.is_empty()), "no dimension");
        assert!(shipped().expect("they parse").read().any(|m| !m.optional.is_empty()));
    }

    #[test]
    fn near_words_are_found_and_far_ones_are_not() {
        for (word, found) in [("vetnas", Some("ventas")), ("Ventas", Some("ventas")), ("orders", None), ("venta", Some("ventas"))]
        {
            assert_eq!(nearest(word, ["clientes", "ventas"]), found, "{word}");
        }
    }
}
