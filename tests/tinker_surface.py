"""Public names of the tinker SDK 0.38.0 that loops use."""

CALLS: dict[str, dict[str, str]] = {
    "ServiceClient": {
        "__init__": "user_metadata=, project_id=, *, display_name=, base_url=, api_key=, default_headers_overrides=",
        "close": "status, detail=",
        "copy_weights": "path, *, ttl_seconds=, weights_access_token=",
        "create_custom_loss": "fn, input_ranks",
        "create_lora_training_client": "base_model, rank=, seed=, train_mlp=, train_attn=, train_unembed=, "
        "user_metadata=, optimizer=",
        "create_rest_client": "",
        "create_sampling_client": "model_path=, base_model=, retry_config=, record_stability_info=",
        "create_training_client_from_state": "path, base_model=, user_metadata=, weights_access_token=, optimizer=",
        "create_training_client_from_state_with_optimizer": "path, base_model=, user_metadata=, weights_access_token=",
        "get_console_url": "",
        "get_server_capabilities": "",
        "get_telemetry": "",
        "holder": "",
    },
    "TrainingClient": {
        "create_sampling_client": "model_path, retry_config=, record_stability_info=",
        "forward": "data, loss_fn, loss_fn_config=",
        "forward_backward": "data, loss_fn, loss_fn_config=",
        "forward_backward_custom": "data, loss_fn, *, loss_type_input=",
        "get_console_url": "",
        "get_info": "",
        "get_telemetry": "",
        "get_tokenizer": "",
        "load_state": "path, weights_access_token=",
        "load_state_with_optimizer": "path, weights_access_token=",
        "optim_step": "optim_params=, *, adam_params=",
        "save_state": "name, ttl_seconds=, overwrite=, user_metadata=",
        "save_weights_and_get_sampling_client": "name=, retry_config=, record_stability_info=, kind=",
        "save_weights_external": "name, ttl_seconds=, age_encryption_recipients=",
        "save_weights_for_sampler": "name, ttl_seconds=, user_metadata=",
    },
    "SamplingClient": {
        "compute_logprobs": "prompt, prompt_logprobs_last_n=",
        "create": "holder, *, model_path=, base_model=, sampling_session_id=, retry_config=, record_stability_info=",
        "from_sampler_handle": "handle, *, api_key=",
        "get_base_model": "",
        "get_sampler_handle": "",
        "get_telemetry": "",
        "get_tokenizer": "",
        "on_queue_state_change": "queue_state, queue_state_reason",
        "sample": "prompt, num_samples, sampling_params, include_prompt_logprobs=, topk_prompt_logprobs=, "
        "topk_sample_logprobs=, target_prompt_logprobs=, prompt_alt_tokens_k=, prompt_logprobs_last_n=",
    },
    "RestClient": {
        "assign_session_project": "session_id, project_id",
        "copy_weights": "path, destination_project_id=, *, ttl_seconds=, weights_access_token=",
        "delete_checkpoint": "training_run_id, checkpoint_id",
        "delete_checkpoint_from_tinker_path": "tinker_path",
        "export_session_trace": "session_id",
        "get_audit_log": "event_type=, day=",
        "get_billing_usage": "starting_on, ending_before",
        "get_current_checkpoint_storage_usage": "project_id=",
        "get_external_weights_urls": "tinker_path",
        "get_sampler": "sampler_id",
        "get_server_capabilities": "",
        "get_session": "session_id, access_scope=",
        "get_telemetry": "",
        "get_training_run": "training_run_id, access_scope=",
        "get_training_run_by_tinker_path": "tinker_path, access_scope=",
        "get_weights_info_by_tinker_path": "tinker_path",
        "list_checkpoints": "training_run_id",
        "list_sessions": "limit=, offset=, access_scope=",
        "list_training_runs": "limit=, offset=, access_scope=, project_id=",
        "list_user_checkpoints": "limit=, offset=",
        "publish_checkpoint_from_tinker_path": "tinker_path",
        "search_sessions": "request",
        "set_checkpoint_ttl_from_tinker_path": "tinker_path, ttl_seconds",
        "unpublish_checkpoint_from_tinker_path": "tinker_path",
        "whoami": "",
    },
    "APIFuture": {
        "coroutine": "",
        "future": "",
        "result": "timeout=",
    },
}
"""Calls by class, with their arguments: "=" stands behind one that has a default, "*" before those given by name."""

TWINS: dict[str, str] = {
    "ServiceClient": (
        "create_lora_training_client create_sampling_client create_training_client_from_state "
        "create_training_client_from_state_with_optimizer get_server_capabilities"
    ),
    "TrainingClient": (
        "create_sampling_client forward forward_backward forward_backward_custom get_info load_state "
        "load_state_with_optimizer optim_step save_state save_weights_and_get_sampling_client "
        "save_weights_external save_weights_for_sampler"
    ),
    "SamplingClient": "compute_logprobs get_base_model sample",
    "RestClient": (
        "assign_session_project copy_weights delete_checkpoint delete_checkpoint_from_tinker_path "
        "export_session_trace get_audit_log get_billing_usage get_current_checkpoint_storage_usage "
        "get_external_weights_urls get_sampler get_session get_training_run get_training_run_by_tinker_path "
        "list_checkpoints list_sessions list_training_runs list_user_checkpoints "
        "publish_checkpoint_from_tinker_path set_checkpoint_ttl_from_tinker_path "
        "unpublish_checkpoint_from_tinker_path"
    ),
    "APIFuture": "result",
}
"""Those of them that have an `…_async` twin of the same arguments."""

PACKAGE = """
APIConnectionError APIError APIFuture APIResponseValidationError APIStatusError APITimeoutError AdamOptimizerConfig
AdamParams AdminClient AuthenticationError BackcompatSamplingClientFuture BackcompatTrainingClientFuture
BadRequestError BillingError Checkpoint CheckpointType ConflictError Datum DimuonOptimizerConfig DimuonParams
DmelChunk EncodedTextChunk ExperimentalWarning ForwardBackwardOutput ImageAssetPointerChunk ImageChunk
InternalServerError LoraConfig LossHandle ModelID ModelInput ModelInputChunk NotFoundError OptimParams
OptimStepRequest OptimStepResponse ParsedCheckpointTinkerPath PerDatumLossFn PermissionDeniedError
PromptProvenanceSpan RateLimitError RequestFailedError RequestOptions RestClient SampleRequest SampleResponse
SampledProvenanceSpan SampledSequence SamplingClient SamplingParams ServiceClient StopReason TensorData TensorDtype
Timeout TinkerError TrainingClient TrainingRun UnprocessableEntityError auth types
"""

TYPES = """
AdamParams Datum EncodedTextChunk ForwardBackwardOutput GetInfoResponse GetServerCapabilitiesResponse LoraConfig
LossFnType ModelData ModelInput ModelInputChunk OptimStepResponse SampleResponse SampledSequence SamplingParams
SaveWeightsForSamplerResponse SaveWeightsResponse StopReason SupportedModel TensorData TensorDtype
"""
"""Of the module `types`."""

MEMBERS: dict[str, str] = {
    "AdamParams": "learning_rate beta1 beta2 eps weight_decay grad_clip_norm",
    "Datum": "model_input loss_fn_inputs",
    "EncodedTextChunk": "tokens length",
    "ForwardBackwardOutput": "loss_fn_outputs metrics",
    "GetInfoResponse": "model_data model_id is_lora lora_rank model_name",
    "GetServerCapabilitiesResponse": "supported_models",
    "LoraConfig": "rank seed train_unembed train_mlp train_attn",
    "ModelData": "arch model_name tokenizer_id",
    "ModelInput": "chunks from_ints to_ints length empty append append_int",
    "OptimStepResponse": "metrics",
    "SampleResponse": "sequences prompt_logprobs topk_prompt_logprobs prompt_logprobs_np prompt_cache_hit_tokens",
    "SampledSequence": "stop_reason sequence_id tokens logprobs tokens_np logprobs_np",
    "SamplingParams": "max_tokens seed stop temperature top_k top_p",
    "SaveWeightsForSamplerResponse": "path",
    "SaveWeightsResponse": "path",
    "SupportedModel": "model_name max_context_length trainable sampleable",
    "TensorData": "data dtype shape from_numpy from_torch to_numpy to_torch tolist",
}
"""Of types: fields, properties and methods."""
