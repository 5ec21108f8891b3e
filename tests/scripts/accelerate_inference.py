"""As Accelerate's guides teach it: PartialState, split_between_processes, gather_object; and accumulated gradients."""

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader


def main():
    state = PartialState(cpu=True)
    with state.split_between_processes(["a dog", "a cat", "a chicken", "a cow", "a hen"]) as prompts:
        answers = [f"{prompt}!" for prompt in prompts]
    answers = gather_object(answers)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader([torch.tensor([float(number)]) for number in range(16)], batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = 0
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward((model(batch) - 3 * batch).square().mean())
            optimizer.step()
            steps += accelerator.sync_gradients
            optimizer.zero_grad()
    weight = accelerator.unwrap_model(model).weight.item()
    print(f"result rank {state.process_index} answers {answers} steps {steps} weight {weight:.6f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
