"""The vLLM names that MoE plugins rely on or replace; part of `hooks.TABLE`."""

from __future__ import annotations

from vllm_ext.probes import Hook, has, resolve, row, sets, takes


def _mapping(name: str) -> str:
    return "" if isinstance(resolve(name), dict) else f"{name} is no dictionary."


_MOE = "vllm.model_executor.layers.fused_moe"
_APPLY = [
    *("output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts"),
    *("expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta"),
    "apply_router_weight_on_input",
]

ROWS: tuple[Hook, ...] = (
    row(_mapping, "vllm.model_executor.custom_op:op_registry_oot", "puts the plugins' MoE layers in place"),
    row(takes, f"{_MOE}:MoERunner.__init__", "the MoE layer", ["layer_name", "moe_config", "router", "routed_experts"]),
    row(takes, f"{_MOE}:UnquantizedFusedMoEMethod.__init__", "unquantized experts", ["moe"]),
    row(sets, f"{_MOE}:UnquantizedFusedMoEMethod", "the experts kernel, replaced", ["experts_cls"]),
    row(has, f"{_MOE}:RoutingMethodType", "declares a router of our own", ["Custom"]),
    row(
        takes,
        f"{_MOE}.router.base_router:BaseRouter._compute_routing",
        "a router's choice",
        ["hidden_states", "router_logits", "indices_type", "input_ids"],
    ),
    row(sets, f"{_MOE}.router.base_router:BaseRouter", "capture stays vLLM's", ["top_k", "capture_fn"]),
    row(sets, f"{_MOE}.router.fused_moe_router:FusedMoERouter", "EPLB stays vLLM's", ["eplb_state"]),
    row(takes, f"{_MOE}.router.zero_expert_router:ZeroExpertRouter", "is refused"),
    row(
        sets,
        f"{_MOE}.routed_experts:RoutedExperts",
        "what a model's own routing does",
        [
            *("renormalize", "use_grouped_topk", "custom_routing_function", "routed_scaling_factor"),
            *("e_score_correction_bias", "quant_method", "scoring_func", "moe_config"),
        ],
    ),
    row(
        has,
        f"{_MOE}.config:FusedMoEConfig",
        "what plugins are told of a layer",
        [
            *("num_logical_experts", "experts_per_token", "hidden_dim", "intermediate_size_per_partition", "in_dtype"),
            *("device", "max_num_tokens", "activation", "has_bias", "swiglu_limit", "has_hash_routing"),
            *("num_experts", "ep_size"),
        ],
    ),
    row(has, f"{_MOE}.activation:MoEActivation", "other activations are refused", ["SILU"]),
    row(takes, f"{_MOE}.experts.triton_moe:TritonExperts.apply", "vLLM's experts on GPUs", _APPLY),
    row(takes, f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.apply", "vLLM's experts on CPUs", _APPLY),
    row(
        takes,
        f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.process_weights_after_loading",
        "packs weights, unless a plugin reads them",
        ["layer"],
    ),
    row(
        has,
        "vllm.v1.worker.worker_base:WorkerBase",
        "extended on the instance: model loaded, warm-up over, step done, end",
        ["load_model", "get_model", "compile_or_warm_up_model", "execute_model", "shutdown"],
    ),
    row(takes, "vllm.distributed.parallel_state:get_tp_group", "one rank writes the trace"),
    row(
        has,
        "vllm.v1.core.sched.output:SchedulerOutput",
        "tokens of a step",
        ["scheduled_new_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens", "finished_req_ids"],
    ),
    row(has, "vllm.v1.core.sched.output:NewRequestData", "prompts of a trace", ["req_id", "prompt_token_ids"]),
    row(sets, "vllm.v1.worker.gpu_input_batch:InputBatch", "rows of a step, runner V1", ["num_computed_tokens_cpu"]),
    row(
        has,
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        "rows of a step, runner V2",
        ["req_ids", "query_start_loc_np", "num_computed_tokens_np"],
    ),
    row(has, "vllm.v1.worker.gpu.model_runner:ExecuteModelState", "the same", ["input_batch"]),
    row(
        has,
        "vllm.config:ModelConfig",
        "is it an MoE model, and which",
        ["is_moe", "get_num_experts", "get_num_experts_per_tok", "get_hidden_size", "get_total_num_hidden_layers"],
    ),
    row(has, "vllm.config:VllmConfig", "what MoE plugins check", ["lora_config", "kernel_config", "aux_output_config"]),
    row(
        has, "vllm.config:CompilationConfig", "largest graph: rows of a trace's buffer", ["max_cudagraph_capture_size"]
    ),
    row(has, "vllm.config.kernel:KernelConfig", "kernels that route by themselves", ["moe_backend"]),
    row(has, "vllm.config.aux_output:AuxOutputConfig", "--enable-return-routed-experts", ["enabled"]),
    row(has, "vllm.config:ParallelConfig", "what a trace refuses", ["data_parallel_size", "pipeline_parallel_size"]),
)
