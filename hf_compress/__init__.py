"""hf_compress"""
from .integrations.transformers import register
register()
from .methods.rtn import RTNQuantConfig
from .methods.int8_dynamic import Int8DynamicQuantConfig
from .methods.cast import CastConfig
from .pipeline.quantize import quantize
from .pipeline.planning import plan
from .checkpoint.load import load_packed
