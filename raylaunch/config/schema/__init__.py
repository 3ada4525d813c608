"""The typed configuration: one model per section of the YAML file, a module per group of sections.

Strict: an unknown key, a wrong type or an impossible value is an error. Reading files, layering
and line numbers are in `loader`; this package is the schema and what follows from it.
"""

from raylaunch.config.schema.base import (
    NAME_PATTERN,
    TIME_PATTERN,
    URL_PATTERN,
    Address,
    Environment,
    Line,
    Name,
    Nodes,
    NotNegative,
    Positive,
    Section,
    Share,
    SlurmTime,
    check_address,
    check_environment_value,
    check_line,
    check_name,
    check_variable,
    parse_nodes,
    parse_time,
)
from raylaunch.config.schema.cluster import ClusterConfig, ElasticConfig, JoinConfig, SlurmConfig
from raylaunch.config.schema.data import LEAST_SHARE, STDLIB, DataConfig
from raylaunch.config.schema.kinds import FieldType, section_type
from raylaunch.config.schema.model import SIZES, LoraConfig, ModelConfig
from raylaunch.config.schema.outputs import (
    AlertKind,
    AlertsConfig,
    CostConfig,
    LoggingConfig,
    MlflowConfig,
    WandbConfig,
)
from raylaunch.config.schema.trainer import SCRIPT_ENTRY, TrainerConfig
from raylaunch.config.schema.training import CheckpointConfig, DistributedConfig, OptimizerConfig, StepSchedulerConfig
from raylaunch.config.schema.whole import Config, continuation_differences, default_run_name

__all__ = [
    "LEAST_SHARE",
    "NAME_PATTERN",
    "SCRIPT_ENTRY",
    "SIZES",
    "STDLIB",
    "TIME_PATTERN",
    "URL_PATTERN",
    "Address",
    "AlertKind",
    "AlertsConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "CostConfig",
    "DataConfig",
    "DistributedConfig",
    "ElasticConfig",
    "Environment",
    "FieldType",
    "JoinConfig",
    "Line",
    "LoggingConfig",
    "LoraConfig",
    "MlflowConfig",
    "ModelConfig",
    "Name",
    "Nodes",
    "NotNegative",
    "OptimizerConfig",
    "Positive",
    "Section",
    "Share",
    "SlurmConfig",
    "SlurmTime",
    "StepSchedulerConfig",
    "TrainerConfig",
    "WandbConfig",
    "check_address",
    "check_environment_value",
    "check_line",
    "check_name",
    "check_variable",
    "continuation_differences",
    "default_run_name",
    "parse_nodes",
    "parse_time",
    "section_type",
]
