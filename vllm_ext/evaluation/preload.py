"""What every engine imports; nothing here may touch a CUDA device, since processes are forked from this state."""

from vllm_ext.evaluation.engine import prepare_process

prepare_process()

import vllm.entrypoints.llm  # noqa: E402
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.gpu_worker  # noqa: E402, F401
