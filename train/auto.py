"""Makes transformers' Auto classes know our models: `import train.auto`, then `AutoModelForCausalLM` and its kin."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
)

# Where torchvision is missing, transformers 5.17 and 5.18 put in the place of this name one that refuses to be used.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from train.data.processor import MegrezOImageProcessor, MegrezOProcessor
from train.modules.megrezo import MegrezO, MegrezOConfig
from train.modules.text import MiniCPMConfig, MiniCPMForCausalLM

AutoConfig.register(MegrezOConfig.model_type, MegrezOConfig, exist_ok=True)
AutoModel.register(MegrezOConfig, MegrezO, exist_ok=True)
AutoModelForCausalLM.register(MegrezOConfig, MegrezO, exist_ok=True)
AutoConfig.register(MiniCPMConfig.model_type, MiniCPMConfig, exist_ok=True)
AutoModelForCausalLM.register(MiniCPMConfig, MiniCPMForCausalLM, exist_ok=True)
AutoProcessor.register(MegrezOConfig, MegrezOProcessor, exist_ok=True)
AutoImageProcessor.register(MegrezOConfig, slow_image_processor_class=MegrezOImageProcessor, exist_ok=True)
