"""Fine-tuning: adapter methods, training, and the merging of adapters into the weights of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.tuning.merge import merge_adapter as merge_adapter
    from pessa_cli.tuning.options import Tuning as Tuning
    from pessa_cli.tuning.options import load_tuning as load_tuning
    from pessa_cli.tuning.peft_plugin import WAITED_FOR as WAITED_FOR
    from pessa_cli.tuning.peft_plugin import register_all as register_all
    from pessa_cli.tuning.train import Job as Job
    from pessa_cli.tuning.train import TrainingStep as TrainingStep
    from pessa_cli.tuning.train import tune as tune
    from pessa_cli.tuning.tuner_lora_xs import LoraXsConfig as LoraXsConfig
    from pessa_cli.tuning.tuner_pessa import PessaTunerConfig as PessaTunerConfig
    from pessa_cli.tuning.tuner_pica import PicaConfig as PicaConfig
    from pessa_cli.tuning.tuner_sorsa import MiloraConfig as MiloraConfig
    from pessa_cli.tuning.tuner_sorsa import SorsaConfig as SorsaConfig
    from pessa_cli.tuning.tuner_svft import SvftConfig as SvftConfig
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "merge": ["merge_adapter"],
            "options": ["Tuning", "load_tuning"],
            "peft_plugin": ["WAITED_FOR", "register_all"],
            "train": ["Job", "TrainingStep", "tune"],
            "tuner_lora_xs": ["LoraXsConfig"],
            "tuner_pessa": ["PessaTunerConfig"],
            "tuner_pica": ["PicaConfig"],
            "tuner_sorsa": ["MiloraConfig", "SorsaConfig"],
            "tuner_svft": ["SvftConfig"],
        },
    )
