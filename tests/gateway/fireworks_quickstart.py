import os
import torch
from fireworks.training.sdk import types as tinker
import transformers
from gradwire.fireworks import datum_from_tokens_weights
from fireworks.training.sdk import (
    FiretitanServiceClient,
    TrainerJobManager,
    TrainerJobConfig,
)

api_key = os.environ["FIREWORKS_API_KEY"]
account_id = os.environ.get("FIREWORKS_ACCOUNT_ID", "")
base_url = os.environ.get("FIREWORKS_BASE_URL", "https://api.fireworks.ai")
base_model = "accounts/fireworks/models/qwen3-8b"

rlor_mgr = TrainerJobManager(api_key=api_key, base_url=base_url)
endpoint = rlor_mgr.create_and_wait(TrainerJobConfig(
    base_model=base_model,
    lora_rank=0,
    max_context_length=4096,
    learning_rate=1e-5,
    gradient_accumulation_steps=1,
    display_name="sft-quickstart",
))

service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=api_key)
training_client = service.create_training_client(base_model=base_model, lora_rank=0)

tokenizer = transformers.AutoTokenizer.from_pretrained("Qwen/Qwen3-8B", trust_remote_code=True)

training_data = [
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ],
    [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "2 + 2 equals 4."},
    ],
]

def tokenize_conversation(conversation):
    full_text = tokenizer.apply_chat_template(conversation, tokenize=False)
    full_tokens = tokenizer.encode(full_text)
    prompt_text = tokenizer.apply_chat_template(conversation[:1], tokenize=False)
    prompt_len = len(tokenizer.encode(prompt_text))
    weights = torch.zeros(len(full_tokens), dtype=torch.float32)
    weights[prompt_len:] = 1.0
    return datum_from_tokens_weights(
        torch.tensor(full_tokens, dtype=torch.long), weights, max_length=4096,
    )

def sft_loss(data, logprobs_list):
    total_loss = torch.tensor(0.0)
    n_tokens = 0
    for i, logprobs in enumerate(logprobs_list):
        weights = torch.tensor(data[i].loss_fn_inputs["weights"].data, dtype=torch.float32)
        min_len = min(len(logprobs), len(weights))
        total_loss = total_loss - torch.dot(logprobs[:min_len].float(), weights[:min_len])
        n_tokens += weights[:min_len].sum().item()
    loss = total_loss / max(n_tokens, 1)
    return loss, {"sft_loss": loss.item()}

datums = [tokenize_conversation(conv) for conv in training_data]
for step in range(10):
    result = training_client.forward_backward_custom(datums, sft_loss).result()
    training_client.optim_step(
        tinker.AdamParams(learning_rate=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
    ).result()
    print(f"Step {step}: {result.metrics}")

result = training_client.save_weights_for_sampler_ext("sft-final", checkpoint_type="base")
print(f"Checkpoint: {result.snapshot_name}")

rlor_mgr.delete(endpoint.job_id)
