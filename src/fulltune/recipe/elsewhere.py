"""Settings that people know from elsewhere, such as transformers, TRL, LLaMA-Factory and Axolotl: what to write here.

Each answer follows "unknown setting; " or "cannot be set here; ".
"""

from __future__ import annotations

from collections.abc import Mapping

PINNED: Mapping[str, str] = {
    "output_dir": "write output, the folder in which each run gets its own",
    "learning_rate": "write method.learning_rate",
    "per_device_train_batch_size": "write train.micro_batch_size",
    "per_device_eval_batch_size": "write evaluate.batch_size",
    "gradient_accumulation_steps": "write train.global_batch_size, the rows of a step; accumulation follows from it",
    "bf16": "write train.precision: bf16",
    "fp16": "write train.precision: fp16",
    "eval_strategy": "write train.eval_strategy",
    "eval_on_start": "write train.eval_on_start",
    "save_strategy": "write train.eval_strategy; each evaluation saves, train.save_steps adds more",
    "metric_for_best_model": "write evaluate.metric",
    "greater_is_better": "write evaluate.metric; which way is better is known",
    "gradient_checkpointing": "write train.activation_checkpointing",
    "train_sampling_strategy": "write train.group_by_length",
    "use_cpu": "write train.device: cpu",
    "logging_nan_inf_filter": "it is always off: it would log a loss of 0 while the weights are NaN",
    "auto_find_batch_size": "it is always off: it restarts on trained weights and changes the global batch",
    "remove_unused_columns": "it is always off: the collator chooses the columns",
    "resume_from_checkpoint": "leave it out: the same command continues a run",
    "push_to_hub": "not yet: after training use 'hf upload NAME RUN/models/full'",
    "average_tokens_across_devices": "it is always on: the loss counts the items of all processes",
    "save_only_model": "it is always off: without optimizer state a run could not continue",
    "ignore_data_skip": "it is always off: a continued run would see other rows",
    "restore_callback_states_from_checkpoint": "it is always off: early stopping reads the history",
    "data_seed": "write train.seed, or data.split_seed for the splits",
    "dataloader_drop_last": "it is always off: every row is seen once per epoch",
    "bf16_full_eval": "write train.precision: bf16",
    "fp16_full_eval": "write train.precision: fp16",
    "eval_accumulation_steps": "it is not needed: logits are reduced batch by batch",
    "batch_eval_metrics": "it is not needed: logits are reduced batch by batch",
    "logging_strategy": "write train.logging_steps",
    "logging_first_step": "it is always on",
    "disable_tqdm": "it is always on: fulltune has its own display",
    "dataloader_pin_memory": "it is on with a GPU",
    "liger_kernel_config": "write train.use_liger_kernel: true; all kernels but those of the loss are taken",
    "torch_compile_backend": "write train.torch_compile: true; inductor compiles",
    "torch_compile_mode": "write train.torch_compile: true; the mode is torch's default",
    "ddp_backend": "gloo is used on a CPU, else transformers' choice",
    "fsdp": "write train.placement: fsdp2",
}
"""Fields of `transformers.TrainingArguments` that `train.extra` may not set, and what to do instead."""

_ANSWERS: tuple[tuple[str, str], ...] = (
    # model
    ("write model", "base_model model_name model_name_or_path model_id pretrained_model_name_or_path checkpoint"),
    ("write preserve.probe", "generic_text"),
    (
        "not yet: put the tokenizer and a model with as many embedding rows into a folder, and write model: FOLDER",
        "tokenizer tokenizer_name tokenizer_path add_tokens new_tokens special_tokens tokens_to_add add_special_tokens "
        "resize_vocab resize_token_embeddings",
    ),
    (
        "not yet: quantized weights are not trained; model.weights_dtype: bf16 and method: lora need less memory",
        "load_in_4bit load_in_8bit quantization quantization_bit quantization_config qlora bnb_4bit_quant_type "
        "bnb_4bit_compute_dtype bnb_config",
    ),
    ("write train.precision (computations) or model.weights_dtype (weights)", "dtype torch_dtype compute_dtype"),
    (
        "write model.attn_implementation: flash_attention_2",
        "flash_attention flash_attn use_flash_attention use_flash_attention_2 flash_attention_2",
    ),
    ("write model.attn_implementation: sdpa", "sdp_attention xformers_attention"),
    (
        "write model.dropout",
        "hidden_dropout hidden_dropout_prob attention_dropout attention_probs_dropout_prob classifier_dropout",
    ),
    ("set the environment variable HF_TOKEN", "hf_token use_auth_token hub_token hf_use_auth_token"),
    # data
    (
        "write data.train; data sets of the Hub are not read yet: 'hf download' them, and name the file",
        "dataset datasets dataset_name dataset_path dataset_dir train_file train_data train_dataset train_path "
        "data_path data_files",
    ),
    ("write data.eval", "validation_file eval_file eval_dataset val_file valid_file dev_file validation valid val dev"),
    ("write data.test", "test_file test_dataset test_datasets"),
    (
        "write data.eval_fraction, and data.test_fraction",
        "val_set_size val_size validation_split validation_split_percentage eval_size test_size test_split split_ratio",
    ),
    ("write data.text", "text_column text_field dataset_text_field field_text text_col"),
    ("write data.label", "label_column label_col target_column label_field field_label"),
    ("write data.prompt", "prompt_column prompt_field field_instruction instruction instruction_column"),
    ("write data.input", "field_input input_column"),
    ("write data.completion", "completion_column response response_column field_output answer_column"),
    ("write data.messages", "messages_column field_messages conversation conversations conversation_column"),
    (
        "leave it out: the model's own chat template is used; data.chat_template names another one (a Jinja file)",
        "template prompt_template chat_template_name",
    ),
    (
        "write data.max_length",
        "max_token max_tokens max_seq_length max_seq_len max_len cutoff_len sequence_len sequence_length seq_length "
        "block_size model_max_length max_input_length max_source_length max_target_length context_length",
    ),
    ("write data.packing", "sample_packing pack pack_sequences eval_sample_packing"),
    ("write data.truncation_strategy", "truncation truncate"),
    ("write data.max_rows", "max_samples max_train_samples num_samples sample_size subset max_examples limit n_rows"),
    (
        "for a file without a header line write data.columns, such as [text, label]",
        "header has_header no_header column_names names skip_header",
    ),
    (
        "leave it out: .csv has commas, .tsv has tabs",
        "delimiter separator sep csv_delimiter",
    ),
    ("leave it out: train rows are always shuffled, with train.seed", "shuffle shuffle_data shuffle_seed"),
    ("leave it out: the labels are found in the rows", "num_labels num_classes id2label label2id label_names classes"),
    (
        "give a file of data.train a weight: [task.jsonl, {path: generic.jsonl, weight: 0.05}]",
        "interleave_probs mix_strategy mixing mixture sampling_probabilities dataset_weights interleave",
    ),
    (
        "not yet: write one recipe for each fold, with its own data.train and data.test",
        "folds fold num_folds n_folds kfold k_fold cross_validation n_splits cv",
    ),
    (
        "not yet: train.class_weights: balanced lets rare classes count more",
        "oversample oversampling upsample undersample undersampling weighted_sampler sampler balance",
    ),
    (
        "leave it out: prompts are never trained, answers always are",
        "train_on_inputs train_on_input train_on_prompt train_on_responses_only train_on_completions_only "
        "completion_only_loss assistant_only_loss mask_prompt mask_inputs",
    ),
    (
        "not yet as a setting: all answers are trained but those of messages with weight: 0, so write that into them",
        "mask_history train_on_last_turn_only last_turn_only",
    ),
    # method
    ("write method.learning_rate", "lr base_lr max_lr peak_lr init_lr body_lr body_learning_rate"),
    ("write method.head_learning_rate", "head_lr lr_head classifier_lr classifier_learning_rate"),
    (
        "not yet: method: head trains only the head, method: lora little beside frozen weights, and "
        "method.layerwise_lr_decay slows lower layers down",
        "freeze frozen freeze_layers freeze_embeddings freeze_encoder freeze_backbone freeze_base freeze_base_model "
        "freeze_trainable_layers freeze_trainable_modules unfrozen_parameters trainable_layers num_frozen_layers "
        "unfreeze unfreeze_layers",
    ),
    (
        "write method: lora, or {kind: lora, rank: 16}",
        "lora use_lora use_peft peft peft_config lora_config adapter finetuning_type adapter_type peft_type",
    ),
    ("write method: {kind: lora, rank: NUMBER}", "lora_r lora_rank r"),
    ("write method: {kind: lora, alpha: NUMBER}", "lora_alpha"),
    ("write method: {kind: lora, dropout: NUMBER}", "lora_dropout"),
    ("write method: {kind: lora, rslora: true}", "use_rslora peft_use_rslora lora_rslora"),
    (
        "write method: {kind: lora, target_modules: [NAME, ...]}; left out, all linear layers get an update",
        "lora_target lora_target_modules lora_target_linear modules lora_modules",
    ),
    ("after training use 'fulltune merge RUN --output FOLDER'", "merge_lora merge_adapter merge_and_unload export_dir"),
    # training
    ("write train.num_train_epochs", "epochs epoch num_epochs n_epochs max_epochs total_epochs nb_epochs train_epochs"),
    ("write train.max_steps", "steps num_steps total_steps num_training_steps train_steps max_iters num_iterations"),
    (
        "write train.micro_batch_size",
        "per_gpu_train_batch_size per_device_batch_size device_batch_size device_train_microbatch_size "
        "train_micro_batch_size_per_gpu mini_batch_size",
    ),
    (
        "write train.global_batch_size, the rows of a step; accumulation follows from it",
        "grad_accum gradient_accumulation grad_accumulation_steps accumulate_grad_batches accumulation_steps",
    ),
    (
        "write train.global_batch_size (rows of a step) or train.micro_batch_size (rows of a device at a time)",
        "batch_size train_batch_size batch total_batch_size effective_batch_size",
    ),
    ("write evaluate.batch_size", "eval_batch_size per_gpu_eval_batch_size"),
    ("write train.warmup_ratio or train.warmup_steps", "warmup num_warmup_steps warmup_proportion warmup_fraction"),
    ("write train.lr_scheduler_type", "scheduler lr_scheduler lr_schedule schedule scheduler_type"),
    (
        "write train.lr_scheduler_type: cosine_with_min_lr and train.lr_scheduler_kwargs: {min_lr_rate: 0.1}",
        "cosine_min_lr_ratio min_lr min_lr_ratio min_lr_rate",
    ),
    ("write train.optim", "optimizer optimiser optimizer_type optimizer_name"),
    ("write train.optim: adafactor", "adafactor"),
    ("write train.adam_beta1 and train.adam_beta2", "betas adam_betas beta1 beta2 beta_1 beta_2"),
    ("write train.adam_epsilon", "eps epsilon adam_eps"),
    (
        "write train.max_grad_norm",
        "grad_clip clip_grad gradient_clipping gradient_clip_val grad_norm_clip clip_grad_norm max_norm",
    ),
    ("write train.label_smoothing_factor", "label_smoothing smoothing"),
    ("write train.precision", "mixed_precision amp use_amp half bfloat16 float16 fp16_opt_level"),
    ("write train.precision: fp32", "fp32 float32"),
    ("not yet: bf16 is the narrowest type; write train.precision: bf16", "fp8 float8 enable_fp8 fp8_recipe"),
    (
        "write train.activation_checkpointing",
        "use_gradient_checkpointing grad_checkpointing checkpoint_activations",
    ),
    ("write train.activation_offloading, with train.activation_checkpointing: true", "activation_offloading"),
    ("write train.early_stopping_patience", "early_stopping patience early_stopping_rounds early_stop"),
    ("write train.eval_strategy: steps with train.eval_steps", "evaluation_strategy evals_per_epoch eval_every"),
    ("write train.save_steps", "saves_per_epoch save_every save_interval checkpoint_every"),
    ("write train.logging_steps", "log_every log_interval logging_interval log_steps"),
    ("write train.report_to, such as [wandb]", "use_wandb wandb tensorboard mlflow logger tracker trackers log_with"),
    (
        "write train.report_to: [wandb]; the tracker reads WANDB_PROJECT and its like from the environment",
        "wandb_project wandb_entity wandb_name wandb_run_name wandb_run_id wandb_watch",
    ),
    ("write name", "run_name experiment_name exp_name"),
    ("write output", "save_dir out_dir checkpoint_dir output_folder save_path"),
    (
        "leave it out: TensorBoard's files lie in RUN/tensorboard, or where TENSORBOARD_LOGGING_DIR says",
        "logging_dir tensorboard_dir",
    ),
    ("leave it out: each run has a folder of its own; --fresh starts anew", "overwrite_output_dir overwrite_cache"),
    ("leave it out: the same command continues a run", "resume auto_resume_from_checkpoints resume_from"),
    (
        "leave it out: 'fulltune run' does all, 'fulltune train' and 'fulltune predict' a part",
        "do_train do_eval do_predict do_test stage",
    ),
    ("write train.num_processes", "gpus num_gpus n_gpu n_gpus world_size nproc_per_node num_devices devices"),
    ("write train.num_machines, and all their processes in train.num_processes", "nnodes num_nodes n_nodes nodes"),
    ("write train.device", "no_cuda cuda accelerator device_map"),
    (
        "write train.placement: single, ddp, fsdp2, zero2 or zero3",
        "ddp parallelism strategy distributed distributed_type distributed_backend sharding_strategy use_deepspeed",
    ),
    ("write train.placement: zero2 or zero3", "zero zero2 zero3 zero_stage zero_optimization"),
    (
        "write train.placement: zero2 or zero3, or train.extra.deepspeed: FILE for a JSON file of your own",
        "deepspeed deepspeed_config deepspeed_config_file ds_config",
    ),
    ("write train.placement: fsdp2", "fsdp2 fsdp_config fsdp_version use_fsdp fsdp_sharding_strategy"),
    (
        "write train.offload: optimizer or all",
        "cpu_offload offload_optimizer offload_param offload_params offload_optimizer_device offload_param_device "
        "fsdp_offload_params zero_offload",
    ),
    ("write train.offload: nvme:FOLDER", "nvme_path nvme_offload offload_optimizer_nvme_path offload_param_nvme_path"),
    (
        "not yet: train.placement: zero3 or fsdp2 shares a model's weights out over GPUs",
        "tensor_parallel_size tensor_parallel tp_size pipeline_parallel_size context_parallel_size",
    ),
    ("write train.extra.dataloader_num_workers", "num_workers workers preprocessing_num_workers dataset_num_proc"),
    (
        "write train.use_liger_kernel: true; the loss is computed in pieces already (train.chunked_loss)",
        "liger liger_kernel use_liger enable_liger_kernel liger_rope liger_rms_norm liger_glu_activation liger_swiglu "
        "liger_fused_linear_cross_entropy",
    ),
    ("write train.torch_compile: true", "compile use_compile compile_model"),
    ("write train.extra.neftune_noise_alpha", "noise_alpha neftune neftune_alpha"),
    ("write train.class_weights, such as balanced", "class_weight weights label_weights weighted_loss pos_weight"),
    (
        "not in a recipe: from Python, fulltune.run(recipe, compute_loss=...)",
        "loss loss_function loss_fn loss_type criterion focal_loss compute_loss",
    ),
    ("not yet: supervised examples only are trained on", "rl dpo orpo kto ppo grpo reward_model dpo_beta pref_beta"),
    (
        "not yet: train.load_best_model_at_end keeps the weights with the best eval metric",
        "ema ema_decay swa stochastic_weight_averaging",
    ),
    ("not yet: after training use 'hf upload NAME RUN/models/full'", "hub_model_id hub_strategy hub_private_repo"),
    # evaluation
    (
        "write evaluate.metric; further ones from Python, fulltune.run(recipe, metrics=...)",
        "metrics compute_metrics scoring monitor",
    ),
    ("write evaluate.max_new_tokens", "max_gen_length generation_max_length"),
    ("write evaluate.generate_rows", "predict_with_generate eval_generate num_generations do_bench_eval"),
)
"""What to write, and the names from elsewhere that it answers."""

ELSEWHERE: Mapping[str, str] = {
    **{name: answer for answer, names in _ANSWERS for name in names.split()},
    **PINNED,
}
"""Name to what to write here."""


def answer(name: object) -> str | None:
    """What to write in place of a setting's name from elsewhere; None: it is not known."""
    return ELSEWHERE.get(str(name).lower().replace("-", "_"))
