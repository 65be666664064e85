//! Why a broker refuses, in Kafka's code names, and what a client may do about it.

use serde::{Deserialize, Serialize};
use simulacro_core::ports::{Disposition, PortError};

/// A code of Kafka's protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Code {
    /// 1: the offset is not kept any more, or does not exist yet.
    OffsetOutOfRange,
    /// 3: there is no such topic or partition.
    UnknownTopicOrPartition,
    /// 7: no reply in time; the request may have been carried out.
    RequestTimedOut,
    /// 10: a record is above the limit.
    MessageTooLarge,
    /// 13: the connection broke before the request was sent.
    NetworkException,
    /// 15: the coordinator is not there at the moment.
    CoordinatorNotAvailable,
    /// 17: the topic's name is not allowed.
    InvalidTopicException,
    /// 22: the generation is not the present one.
    IllegalGeneration,
    /// 25: the member is not in the group (any more).
    UnknownMemberId,
    /// 36: the topic exists, and differs.
    TopicAlreadyExists,
    /// 37: the number of partitions is not allowed.
    InvalidPartitions,
    /// 47: a newer producer of the same id has taken over.
    InvalidProducerEpoch,
    /// 48: the call is not allowed in this state of the transaction.
    InvalidTxnState,
    /// 49: the broker does not know the producer.
    InvalidProducerIdMapping,
    /// 56: the broker cannot write.
    KafkaStorageError,
    /// 68: the group has members.
    NonEmptyGroup,
    /// 82: another member has joined under the same name.
    FencedInstanceId,
    /// 87: the record breaks a rule of its topic.
    InvalidRecord,
    /// 88: an open transaction holds newer offsets.
    UnstableOffsetCommit,
    /// 90: a newer producer of the same id has taken over, said by the transaction coordinator.
    ProducerFenced,
}

impl Code {
    /// The name in Kafka's documentation.
    pub fn name(self) -> &'static str {
        match self {
            Self::OffsetOutOfRange => "OFFSET_OUT_OF_RANGE",
            Self::UnknownTopicOrPartition => "UNKNOWN_TOPIC_OR_PARTITION",
            Self::RequestTimedOut => "REQUEST_TIMED_OUT",
            Self::MessageTooLarge => "MESSAGE_TOO_LARGE",
            Self::NetworkException => "NETWORK_EXCEPTION",
            Self::CoordinatorNotAvailable => "COORDINATOR_NOT_AVAILABLE",
            Self::InvalidTopicException => "INVALID_TOPIC_EXCEPTION",
            Self::IllegalGeneration => "ILLEGAL_GENERATION",
            Self::UnknownMemberId => "UNKNOWN_MEMBER_ID",
            Self::TopicAlreadyExists => "TOPIC_ALREADY_EXISTS",
            Self::InvalidPartitions => "INVALID_PARTITIONS",
            Self::InvalidProducerEpoch => "INVALID_PRODUCER_EPOCH",
            Self::InvalidTxnState => "INVALID_TXN_STATE",
            Self::InvalidProducerIdMapping => "INVALID_PRODUCER_ID_MAPPING",
            Self::KafkaStorageError => "KAFKA_STORAGE_ERROR",
            Self::NonEmptyGroup => "NON_EMPTY_GROUP",
            Self::FencedInstanceId => "FENCED_INSTANCE_ID",
            Self::InvalidRecord => "INVALID_RECORD",
            Self::UnstableOffsetCommit => "UNSTABLE_OFFSET_COMMIT",
            Self::ProducerFenced => "PRODUCER_FENCED",
        }
    }

    /// What the caller of a port may do after this code.
    pub fn disposition(self) -> Disposition {
        match self {
            Self::NetworkException
            | Self::CoordinatorNotAvailable
            | Self::KafkaStorageError
            | Self::NonEmptyGroup
            | Self::UnstableOffsetCommit => Disposition::Retryable,
            // The transaction has to be aborted; see the port's `Producer`.
            Self::RequestTimedOut | Self::IllegalGeneration | Self::UnknownMemberId | Self::FencedInstanceId => {
                Disposition::Unknown
            }
            Self::OffsetOutOfRange
            | Self::UnknownTopicOrPartition
            | Self::MessageTooLarge
            | Self::InvalidTopicException
            | Self::TopicAlreadyExists
            | Self::InvalidPartitions
            | Self::InvalidProducerEpoch
            | Self::InvalidTxnState
            | Self::InvalidProducerIdMapping
            | Self::InvalidRecord
            | Self::ProducerFenced => Disposition::Permanent,
        }
    }

    /// Whether a client repeats the same request by itself for a while. Not on a full or broken disk: somebody must look.
    pub fn passes(self) -> bool {
        matches!(
            self,
            Self::CoordinatorNotAvailable | Self::NetworkException | Self::RequestTimedOut | Self::UnstableOffsetCommit
        )
    }
}

/// A request that was refused; nothing of it was carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Why.
    pub code: Code,
    /// What was being done, lower case, with the place and the values.
    pub what: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: Code, what: impl Into<String>) -> Self {
        Self { code, what: what.into() }
    }
}

impl From<Refusal> for PortError {
    fn from(refusal: Refusal) -> Self {
        let error = match refusal.code.disposition() {
            Disposition::Retryable => Self::retryable(refusal.what),
            Disposition::Permanent => Self::permanent(refusal.what),
            Disposition::Unknown => Self::unknown(refusal.what),
        };
        // Kafka's client makes one fatal state of both codes that fence, so that callers have one thing to ask for.
        error.code(match refusal.code {
            Code::ProducerFenced => Code::InvalidProducerEpoch.name(),
            code => code.name(),
        })
    }
}
