"""tidar: language models that think in diffusion and talk in autoregression (TiDAR, arXiv 2511.08923)."""

__version__ = "0.1.0"

from tidar.api import TidarModel
from tidar.config import TidarConfig
from tidar.decode.engine import Answer, Update
from tidar.errors import TidarError
from tidar.layout import Layout

__all__ = ["Answer", "Layout", "TidarConfig", "TidarError", "TidarModel", "Update"]
