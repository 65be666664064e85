//! Schema enforcement: what is written has exactly the columns of its table, and no null where the table has none.
//!
//! Types are compared as Delta stores them: `Utf8View` and `Utf8` are one type, `int32` and `int64` are two. What it
//! leaves out: contracts, which are checked before anything gets here.

use std::{
    hash::{Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use arrow::{
    array::Array,
    datatypes::{DataType, Field, FieldRef, Schema, TimeUnit},
};
use deltalake::{
    DeltaTable,
    datafusion::{
        common::Column as ColumnName,
        error::{DataFusionError, Result as PlanResult},
        execution::FunctionRegistry,
        logical_expr::{
            ColumnarValue, Expr, LogicalPlan, LogicalPlanBuilder, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl,
            Signature, Volatility, lit,
        },
        prelude::SessionContext,
        scalar::ScalarValue,
    },
    kernel::{StructField, engine::arrow_conversion::TryIntoKernel, normalize_for_delta},
    protocol::DeltaOperation,
};
use simulacro_core::ports::{AddColumns, Commit, PortError, Result};

use crate::{
    DeltaLakehouse,
    commit::{Refused, Start, Txn},
    read_failed,
};

/// `not_null(value, 'column')`: the value, or an error that names the column.
///
/// delta-rs makes a text of an error that it meets while it writes, so that the session keeps the refusal, too.
#[derive(Debug)]
struct NotNull {
    signature: Signature,
    refusal: Arc<Mutex<Option<String>>>,
}

impl PartialEq for NotNull {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.refusal, &other.refusal)
    }
}

impl Eq for NotNull {}

impl Hash for NotNull {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name().hash(state);
    }
}

const NOT_NULL: &str = "not_null";

/// The function as it is registered with a session.
pub(crate) fn not_null() -> ScalarUDF {
    ScalarUDF::from(NotNull { signature: Signature::any(2, Volatility::Immutable), refusal: Arc::default() })
}

/// What the session has refused.
pub(crate) fn refusal(ctx: &SessionContext) -> Option<String> {
    let function = ctx.udf(NOT_NULL).ok()?;
    let known = function.inner().downcast_ref::<NotNull>()?;
    known.refusal.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

impl ScalarUDFImpl for NotNull {
    fn name(&self) -> &str {
        NOT_NULL
    }
    fn signature(&self) -> &Signature {
        &self.signature
    }
    fn return_type(&self, types: &[DataType]) -> PlanResult<DataType> {
        Ok(types[0].clone())
    }
    fn return_field_from_args(&self, args: ReturnFieldArgs) -> PlanResult<FieldRef> {
        Ok(Arc::new(Field::new(self.name(), args.arg_fields[0].data_type().clone(), false)))
    }
    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> PlanResult<ColumnarValue> {
        let column = match args.args.get(1) {
            Some(ColumnarValue::Scalar(ScalarValue::Utf8(Some(name)) | ScalarValue::Utf8View(Some(name)))) => name.clone(),
            _ => return Err(DataFusionError::Plan("not_null: expected the column's name as a literal text".into())),
        };
        let (nulls, rows) = match &args.args[0] {
            ColumnarValue::Array(array) => (array.logical_null_count(), array.len()),
            ColumnarValue::Scalar(value) => (usize::from(value.is_null()) * args.number_rows, args.number_rows),
        };
        if nulls > 0 {
            let text = format!("column {column}: found {nulls} nulls in {rows} rows, expected none");
            self.refusal.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| text.clone());
            return Err(DataFusionError::External(Box::new(Refused(text))));
        }
        Ok(args.args[0].clone())
    }
}

/// A type in the contracts' words.
fn words(data_type: &DataType) -> String {
    match data_type {
        DataType::Utf8 => "string".into(),
        DataType::Int64 => "int64".into(),
        DataType::Int32 => "int32".into(),
        DataType::Float64 => "float64".into(),
        DataType::Boolean => "boolean".into(),
        DataType::Date32 => "date".into(),
        DataType::Timestamp(TimeUnit::Microsecond, Some(_)) => "timestamp".into(),
        DataType::Timestamp(TimeUnit::Microsecond, None) => "timestamp without zone".into(),
        DataType::Decimal128(p, s) => format!("decimal({p},{s})"),
        other => other.to_string().to_lowercase(),
    }
}

/// A type as a Delta table stores it.
fn stored(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Utf8View | DataType::LargeUtf8 => DataType::Utf8,
        DataType::BinaryView | DataType::LargeBinary => DataType::Binary,
        DataType::UInt8 => DataType::Int8,
        DataType::UInt16 => DataType::Int16,
        DataType::UInt32 => DataType::Int32,
        DataType::UInt64 => DataType::Int64,
        DataType::Dictionary(_, value) => stored(value),
        other => other.clone(),
    }
}

fn column(name: &str) -> Expr {
    Expr::Column(ColumnName::from_name(name))
}

/// The value, or an error that names the column.
pub(crate) fn guarded(ctx: &SessionContext, value: Expr, name: &str) -> PlanResult<Expr> {
    Ok(ctx.udf(NOT_NULL)?.call(vec![value, lit(name)]).alias(name))
}

/// The plan with the table's columns in the table's order, where a null in a column that is not nullable is an error.
///
/// # Errors
/// `Permanent`, naming each column that is missing, extra or of another type.
pub(crate) fn conform(ctx: &SessionContext, table: &str, opened: &DeltaTable, plan: LogicalPlan) -> Result<LogicalPlan> {
    let state = opened.snapshot().map_err(|e| PortError::permanent(format!("read the columns of {table}")).because(e))?;
    let expected = state.snapshot().arrow_schema();
    let found = normalize_for_delta(plan.schema().inner());
    let mut differences = Vec::new();
    for want in expected.fields() {
        let type_ = words(&stored(want.data_type()));
        match found.field_with_name(want.name()) {
            Err(_) => differences.push(format!("column {}: found none, expected {type_}", want.name())),
            Ok(have) if stored(have.data_type()) != stored(want.data_type()) => {
                let have = words(&stored(have.data_type()));
                differences.push(format!("column {}: found {have}, expected {type_}", want.name()));
            }
            Ok(_) => {}
        }
    }
    for have in found.fields() {
        if expected.field_with_name(have.name()).is_err() {
            differences.push(format!("column {}: found {}, expected none", have.name(), words(&stored(have.data_type()))));
        }
    }
    if !differences.is_empty() {
        return Err(PortError::permanent(format!("write {table}: {}", differences.join("; "))).code("SCHEMA"));
    }
    let exprs = expected.fields().iter().map(|want| {
        let nullable = want.is_nullable() || found.field_with_name(want.name()).is_ok_and(|have| !have.is_nullable());
        if nullable { Ok(column(want.name())) } else { guarded(ctx, column(want.name()), want.name()) }
    });
    let exprs: PlanResult<Vec<Expr>> = exprs.collect();
    let projected = exprs.and_then(|exprs| LogicalPlanBuilder::new(plan).project(exprs)?.build());
    projected.map_err(|e| PortError::permanent(format!("write {table}: arrange its columns")).because(e))
}

/// A type from the contracts' words.
fn parse(text: &str) -> Option<DataType> {
    Some(match text {
        "string" => DataType::Utf8,
        "int64" => DataType::Int64,
        "float64" => DataType::Float64,
        "boolean" => DataType::Boolean,
        "date" => DataType::Date32,
        "timestamp" => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        other => {
            let (precision, scale) = other.strip_prefix("decimal(")?.strip_suffix(')')?.split_once(',')?;
            let (precision, scale): (u8, u8) = (precision.trim().parse().ok()?, scale.trim().parse().ok()?);
            if !(1..=38).contains(&precision) || scale > precision {
                return None;
            }
            DataType::Decimal128(precision, i8::try_from(scale).ok()?)
        }
    })
}

impl DeltaLakehouse {
    pub(crate) async fn evolve(&self, change: &AddColumns) -> Result<Commit> {
        let table = &change.table;
        let txn = Txn::of(table, &change.mark);
        let opened = match self.start(table, &txn).await? {
            Start::Done(version) => return Ok(Commit::Already(version)),
            Start::From(Some(opened)) => opened,
            Start::From(None) => return Err(PortError::permanent(format!("add columns to {table}: no such table"))),
        };
        let failed = |e: deltalake::DeltaTableError| read_failed(format!("read the columns of {table}"), e);
        let present = opened.snapshot().map_err(failed)?.snapshot().arrow_schema();
        let mut fields = Vec::new();
        for asked in &change.columns {
            let at = format!("add column {} to {table}", asked.name);
            let type_ = parse(&asked.physical_type).ok_or_else(|| {
                PortError::permanent(format!(
                    "{at}: found type {}, expected string, int64, float64, boolean, date, timestamp or decimal(p,s)",
                    asked.physical_type
                ))
            })?;
            match present.field_with_name(&asked.name) {
                Ok(have) if stored(have.data_type()) == type_ => {}
                Ok(have) => {
                    let have = words(&stored(have.data_type()));
                    return Err(
                        PortError::permanent(format!("{at}: found it as {have}, expected {}", words(&type_))).code("SCHEMA")
                    );
                }
                Err(_) => fields.push(Field::new(&asked.name, type_, true)),
            }
        }
        let arrow = Schema::new(fields);
        let fields: Vec<StructField> = arrow
            .fields()
            .iter()
            .map(|f| f.as_ref().try_into_kernel())
            .collect::<Result<_, arrow::error::ArrowError>>()
            .map_err(|e| PortError::permanent(format!("add columns to {table}")).because(e))?;
        let what = format!("add columns to {table} as {}, epoch {}", change.mark.writer, change.mark.epoch);
        let result = if fields.is_empty() {
            Self::commit_mark(&opened, &txn, DeltaOperation::AddColumn { fields }).await
        } else {
            opened.add_columns().with_fields(fields).with_commit_properties(txn.properties()).await
        };
        self.settle(table, &txn, what, None, result).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_read_as_they_are_written() {
        for text in ["string", "int64", "float64", "boolean", "date", "timestamp", "decimal(10,2)", "decimal(38,0)"] {
            assert_eq!(parse(text).map(|t| words(&t)).as_deref(), Some(text));
        }
        for text in ["", "int32", "decimal", "decimal(0,0)", "decimal(39,2)", "decimal(2,3)", "decimal(10,2", "decimal(-1,2)"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
