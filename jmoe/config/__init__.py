"""Every configuration record, the presets, and the way to and from JSON."""

from jmoe.config.attention import AttentionConfig as AttentionConfig
from jmoe.config.attention import GQAConfig as GQAConfig
from jmoe.config.attention import MLAConfig as MLAConfig
from jmoe.config.attention import YarnConfig as YarnConfig
from jmoe.config.data import DataConfig as DataConfig
from jmoe.config.data import SourceConfig as SourceConfig
from jmoe.config.mesh import MeshConfig as MeshConfig
from jmoe.config.mesh import PipelineConfig as PipelineConfig
from jmoe.config.model import DenseConfig as DenseConfig
from jmoe.config.model import ExchangeConfig as ExchangeConfig
from jmoe.config.model import FeedForwardConfig as FeedForwardConfig
from jmoe.config.model import ModelConfig as ModelConfig
from jmoe.config.model import MoEConfig as MoEConfig
from jmoe.config.model import RouterConfig as RouterConfig
from jmoe.config.monitor import MonitorConfig as MonitorConfig
from jmoe.config.records import from_dict as from_dict
from jmoe.config.records import override as override
from jmoe.config.records import to_dict as to_dict
from jmoe.config.run import HorizonConfig as HorizonConfig
from jmoe.config.run import OptimizerConfig as OptimizerConfig
from jmoe.config.run import RunConfig as RunConfig
from jmoe.config.run import ScheduleConfig as ScheduleConfig
from jmoe.config.train import LayerRateConfig as LayerRateConfig
from jmoe.config.train import StepwiseConfig as StepwiseConfig
from jmoe.config.train import TrainConfig as TrainConfig
