//! The file format: the Open Data Contract Standard v3.1, as far as a table needs it.
//!
//! Every key of the standard is known, so that a misspelt one is an error with its line; what is not interpreted here is
//! documentation and ignored. What would change the meaning of a table and cannot be judged is refused in [`super`].

use std::collections::BTreeMap;

use serde::{Deserialize, de::IgnoredAny};
use serde_saphyr::Spanned;

type Ignored = Option<IgnoredAny>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "documentation keys are named so that a misspelt key is an error")]
pub(super) struct File {
    pub api_version: Spanned<String>,
    pub kind: Spanned<String>,
    pub id: String,
    pub version: String,
    pub schema: Spanned<Vec<Object>>,
    #[serde(default)]
    pub sla_properties: Vec<Sla>,
    status: Ignored,
    name: Ignored,
    tenant: Ignored,
    tags: Ignored,
    servers: Ignored,
    data_product: Ignored,
    description: Ignored,
    domain: Ignored,
    support: Ignored,
    price: Ignored,
    team: Ignored,
    roles: Ignored,
    authoritative_definitions: Ignored,
    custom_properties: Ignored,
    contract_created_ts: Ignored,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "documentation keys are named so that a misspelt key is an error")]
pub(super) struct Object {
    pub name: Spanned<String>,
    pub physical_name: Option<String>,
    pub properties: Vec<Property>,
    #[serde(default)]
    pub quality: Vec<Spanned<Quality>>,
    #[serde(default)]
    pub relationships: Vec<Spanned<Relationship>>,
    #[serde(default)]
    pub custom_properties: Vec<Spanned<Custom>>,
    id: Ignored,
    physical_type: Ignored,
    logical_type: Ignored,
    description: Ignored,
    business_name: Ignored,
    authoritative_definitions: Ignored,
    tags: Ignored,
    data_granularity_description: Ignored,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "documentation keys are named so that a misspelt key is an error")]
pub(super) struct Property {
    pub name: Spanned<String>,
    pub physical_type: Spanned<String>,
    #[serde(default)]
    pub required: bool,
    #[serde(default)]
    pub unique: bool,
    #[serde(default)]
    pub primary_key: bool,
    pub primary_key_position: Option<i64>,
    #[serde(default)]
    pub partitioned: bool,
    pub partition_key_position: Option<i64>,
    #[serde(default)]
    pub logical_type_options: BTreeMap<String, Spanned<String>>,
    #[serde(default)]
    pub quality: Vec<Spanned<Quality>>,
    #[serde(default)]
    pub relationships: Vec<Spanned<Relationship>>,
    #[serde(default)]
    pub custom_properties: Vec<Spanned<Custom>>,
    id: Ignored,
    physical_name: Ignored,
    logical_type: Ignored,
    description: Ignored,
    business_name: Ignored,
    authoritative_definitions: Ignored,
    tags: Ignored,
    classification: Ignored,
    encrypted_name: Ignored,
    transform_source_objects: Ignored,
    transform_logic: Ignored,
    transform_description: Ignored,
    examples: Ignored,
    critical_data_element: Ignored,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "documentation keys are named so that a misspelt key is an error")]
pub(super) struct Quality {
    pub id: Option<String>,
    pub r#type: Option<String>,
    pub metric: Option<String>,
    pub query: Option<String>,
    #[serde(default)]
    pub arguments: Arguments,
    pub unit: Option<String>,
    pub severity: Option<String>,
    pub must_be: Option<String>,
    pub must_not_be: Option<String>,
    pub must_be_greater_than: Option<String>,
    pub must_be_greater_or_equal_to: Option<String>,
    pub must_be_less_than: Option<String>,
    pub must_be_less_or_equal_to: Option<String>,
    pub must_be_between: Option<[String; 2]>,
    pub must_not_be_between: Option<[String; 2]>,
    name: Ignored,
    description: Ignored,
    dimension: Ignored,
    method: Ignored,
    business_impact: Ignored,
    tags: Ignored,
    authoritative_definitions: Ignored,
    scheduler: Ignored,
    schedule: Ignored,
    custom_properties: Ignored,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Arguments {
    pub valid_values: Option<Vec<String>>,
    /// Ours: a file under `contracts/seeds` instead of the values themselves.
    pub valid_values_seed: Option<String>,
    pub missing_values: Option<Vec<Option<String>>>,
    pub properties: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "documentation keys are named so that a misspelt key is an error")]
pub(super) struct Relationship {
    pub r#type: Option<String>,
    pub from: Option<Names>,
    pub to: Names,
    #[serde(default)]
    pub custom_properties: Vec<Spanned<Custom>>,
    id: Ignored,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Names {
    One(String),
    Many(Vec<String>),
}

impl Names {
    pub fn list(&self) -> Vec<&str> {
        match self {
            Self::One(name) => vec![name],
            Self::Many(names) => names.iter().map(String::as_str).collect(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "documentation keys are named so that a misspelt key is an error")]
pub(super) struct Custom {
    pub property: String,
    pub value: String,
    id: Ignored,
    description: Ignored,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[expect(dead_code, reason = "documentation keys are named so that a misspelt key is an error")]
pub(super) struct Sla {
    pub property: Spanned<String>,
    pub value: Spanned<String>,
    pub unit: Option<String>,
    pub element: Option<String>,
    id: Ignored,
    value_ext: Ignored,
    driver: Ignored,
    description: Ignored,
    scheduler: Ignored,
    schedule: Ignored,
}
