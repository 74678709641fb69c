"""Loading models with transformers, reading audio and data, encoding inputs, and hooks on blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.models.audio import SAMPLE_RATE as SAMPLE_RATE
    from pessa_cli.models.audio import load_audio as load_audio
    from pessa_cli.models.classes import LOCAL_ONLY as LOCAL_ONLY
    from pessa_cli.models.classes import WEIGHTS_ALONE as WEIGHTS_ALONE
    from pessa_cli.models.classes import ModelClass as ModelClass
    from pessa_cli.models.classes import class_of as class_of
    from pessa_cli.models.classes import model_class as model_class
    from pessa_cli.models.data import CalibrationData as CalibrationData
    from pessa_cli.models.data import DataItem as DataItem
    from pessa_cli.models.data import amount_of as amount_of
    from pessa_cli.models.data import read_data as read_data
    from pessa_cli.models.dense import dense_model as dense_model
    from pessa_cli.models.dense import text_part as text_part
    from pessa_cli.models.hooks import BlockModules as BlockModules
    from pessa_cli.models.hooks import Call as Call
    from pessa_cli.models.hooks import block_modules as block_modules
    from pessa_cli.models.hooks import block_squares as block_squares
    from pessa_cli.models.hooks import on_calls as on_calls
    from pessa_cli.models.hooks import output_of as output_of
    from pessa_cli.models.hooks import replay as replay
    from pessa_cli.models.inputs import Inputs as Inputs
    from pessa_cli.models.inputs import built_in_speech as built_in_speech
    from pessa_cli.models.inputs import clip_features as clip_features
    from pessa_cli.models.inputs import has_tokenizer as has_tokenizer
    from pessa_cli.models.inputs import hears as hears
    from pessa_cli.models.inputs import positions_of as positions_of
    from pessa_cli.models.inputs import random_signal as random_signal
    from pessa_cli.models.inputs import random_speech as random_speech
    from pessa_cli.models.inputs import random_tokens as random_tokens
    from pessa_cli.models.inputs import speech_encoder as speech_encoder
    from pessa_cli.models.inputs import text_prompts as text_prompts
    from pessa_cli.models.inputs import transcribe_greedily as transcribe_greedily
    from pessa_cli.models.inputs import transcript_inputs as transcript_inputs
    from pessa_cli.models.inputs import with_decoder_ids as with_decoder_ids
    from pessa_cli.models.inputs import with_encoder_states as with_encoder_states
    from pessa_cli.models.instructions import EXAMPLE_FILES as EXAMPLE_FILES
    from pessa_cli.models.instructions import Rendered as Rendered
    from pessa_cli.models.instructions import Row as Row
    from pessa_cli.models.instructions import form_of as form_of
    from pessa_cli.models.instructions import read_rows as read_rows
    from pessa_cli.models.instructions import render as render
    from pessa_cli.models.layers import LayerCall as LayerCall
    from pessa_cli.models.layers import layer_by_layer as layer_by_layer
    from pessa_cli.models.layers import stacks_of as stacks_of
    from pessa_cli.models.load import encodes_alike as encodes_alike
    from pessa_cli.models.load import from_folder as from_folder
    from pessa_cli.models.load import quiet_transformers as quiet_transformers
    from pessa_cli.models.windows import device_of as device_of
    from pessa_cli.models.windows import on_device as on_device
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "audio": ["SAMPLE_RATE", "load_audio"],
            "classes": ["LOCAL_ONLY", "WEIGHTS_ALONE", "ModelClass", "class_of", "model_class"],
            "data": ["CalibrationData", "DataItem", "amount_of", "read_data"],
            "dense": ["dense_model", "text_part"],
            "hooks": ["BlockModules", "Call", "block_modules", "block_squares", "on_calls", "output_of", "replay"],
            "inputs": [
                "Inputs",
                "built_in_speech",
                "clip_features",
                "has_tokenizer",
                "hears",
                "positions_of",
                "random_signal",
                "random_speech",
                "random_tokens",
                "speech_encoder",
                "text_prompts",
                "transcribe_greedily",
                "transcript_inputs",
                "with_decoder_ids",
                "with_encoder_states",
            ],
            "instructions": ["EXAMPLE_FILES", "Rendered", "Row", "form_of", "read_rows", "render"],
            "layers": ["LayerCall", "layer_by_layer", "stacks_of"],
            "load": ["encodes_alike", "from_folder", "quiet_transformers"],
            "windows": ["device_of", "on_device"],
        },
    )
