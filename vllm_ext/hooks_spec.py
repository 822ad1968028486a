"""vLLM names that speculation relies on or rebinds in worker processes of engines that select it."""

from __future__ import annotations

from vllm_ext.probes import Hook, has, row, sets, takes

_V1 = "vllm.v1.worker.gpu_model_runner"
_V1_SAMPLER = "vllm.v1.sample.rejection_sampler"
_V2 = "vllm.v1.worker.gpu.model_runner"
_SPEC = "vllm.v1.worker.gpu.spec_decode"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_VERIFY = [
    *("logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping", "idx_mapping_np"),
    *("expanded_idx_mapping", "expanded_local_pos", "seq_lens_upper_bound_np", "verify_draft_sampled"),
]


ROWS: tuple[Hook, ...] = (
    row(
        has,
        "vllm.config:SpeculativeConfig",
        "what carries a drafter, and what its checks read",
        [
            *("method", "num_speculative_tokens", "draft_sample_method", "rejection_sample_method"),
            *("num_speculative_tokens_per_batch_size", "parallel_drafting", "prompt_lookup_min"),
        ],
    ),
    row(has, "vllm.config:VllmConfig", "which model runner serves", ["use_v2_model_runner"]),
    row(takes, "vllm.config:VllmConfig.compute_hash", "bench spec: all rows share one compiled model", ["self"]),
    row(
        has,
        "vllm.config:CompilationConfig",
        "bench spec: all rows capture the same graphs",
        ["cudagraph_capture_sizes", "max_cudagraph_capture_size"],
    ),
    row(
        has,
        "vllm.config:ParallelConfig",
        "bench spec: what scheduling says to ranks that are not there",
        ["disable_nccl_for_dp_synchronization", "world_size_across_dp"],
    ),
    row(takes, "vllm.platforms:current_platform.get_device_name", "the device of a cost table"),
    row(takes, f"{_V2}:init_speculator", "V2: own speculators", ["vllm_config", "device", "req_states"]),
    row(takes, f"{_V2}:RejectionSampler", "V2: own verification rules", ["sampler", "spec_config", "device"]),
    row(
        takes,
        f"{_V1_SAMPLER}:expand_batch_to_tokens",
        "V1 on CPUs: sampling parameters of drafts",
        ["x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"],
    ),
    row(takes, f"{_SPEC}.rejection_sampler:RejectionSampler._verify", "V2: the decision is replaced", _VERIFY),
    row(takes, f"{_V2}:GPUModelRunner.add_requests", "V2: texts of new requests", ["scheduler_output"]),
    row(takes, f"{_V2}:GPUModelRunner.finish_requests", "V2: requests that have ended", ["scheduler_output"]),
    row(
        takes,
        f"{_SPEC}.speculator:BaseSpeculator.propose",
        "V2: look-up drafting",
        ["input_batch", "attn_metadata", "slot_mappings", "last_hidden_states", "aux_hidden_states", "num_sampled"],
    ),
    row(
        takes,
        f"{_SPEC}.standalone_ar.speculator:StandaloneARSpeculator._multi_step_decode",
        "V2: parallel drafting replaces the later drafts",
        ["input_batch", "num_rejected", "num_reqs", "skip_attn", "num_tokens_across_dp"],
    ),
    row(
        takes,
        f"{_SPEC}.speculator:DraftModelSpeculator.sample_draft",
        "V2: draws drafts",
        [
            *("hidden_states", "sample_src_positions", "idx_mapping", "temperature", "seeds", "draft_step"),
            "draft_logits",
        ],
    ),
    row(takes, f"{_SPEC}.utils:get_parallel_drafting_token_id", "V2: the mask token", ["hf_config"]),
    row(
        sets,
        "vllm.v1.worker.gpu.states:RequestState",
        "V2: texts and lengths of requests",
        ["all_token_ids", "total_len", "max_num_reqs", "max_model_len"],
    ),
    row(
        takes,
        "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor",
        "V2: texts in pinned host memory",
        ["size", "dtype", "device", "uva_instead_of_gpu"],
    ),
    row(
        takes,
        f"{_V1}:GPUModelRunner.propose_draft_token_ids",
        "V1: passes request ids to the proposer",
        ["scheduler_output"],
    ),
    row(takes, f"{_V1_SAMPLER}:RejectionSampler.forward", "V1: own verification rules", ["metadata"]),
    row(
        takes,
        f"{_V1_SAMPLER}:rejection_sample",
        "V1: the decision is replaced",
        ["draft_token_ids", "num_draft_tokens", "max_spec_len", "draft_probs", "target_logits", "bonus_token_ids"],
    ),
    row(
        takes,
        f"{_SCHEDULER}.make_spec_decoding_stats",
        "what became of a request's drafts",
        ["num_draft_tokens", "num_accepted_tokens", "num_invalid_spec_tokens", "request_id"],
    ),
    row(sets, _SCHEDULER, "draft lengths", ["dynamic_sd_lookup", "num_spec_tokens"]),
    row(takes, f"{_SCHEDULER}.schedule", "draft lengths of requests", ["throttle_prefills"]),
    row(sets, "vllm.v1.request:Request", "drafts that wait to be verified", ["spec_token_ids", "is_prefill_chunk"]),
    row(takes, "vllm.v1.core.sched.async_scheduler:AsyncScheduler", "the same under asynchronous scheduling"),
)
