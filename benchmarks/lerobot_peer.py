"""Runs in a Python that has LeRobot, not in ours: one of its policies, trained and asked on an exported dataset.

    python lerobot_peer.py act|diffusion train   TRAIN FOLDER SECONDS     until so much processor time is spent
    python lerobot_peer.py act|diffusion ask     TRAIN FOLDER EPISODES    chunks of its frames, into FOLDER/asked.npz
    python lerobot_peer.py act|diffusion serve   TRAIN FOLDER -           observations on stdin, chunks on stdout
    python lerobot_peer.py act|diffusion loader  TRAIN FOLDER BATCHES     samples a second

Sizes are LeRobot's defaults (0.4.4) where the comment says nothing else.
"""

import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from lerobot.configs.types import FeatureType
from lerobot.datasets.factory import IMAGENET_STATS, resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.sampler import EpisodeAwareSampler
from lerobot.datasets.utils import dataset_to_policy_features
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.factory import make_policy_config, make_pre_post_processors

BATCH = 8
TICKS = 1000  # of the schedule of the learning rate, which ends with the time and not after so many steps
MOST_ASKED = 200  # held-out frames, evenly over all
# What differs from LeRobot's defaults, and why. ACT's 100 actions at 50 Hz last 2 s: 20 at 10 Hz. No hub gives its
# backbone's weights here; its learning rate of 1e-5 is for a pretrained one and long trainings. Its transformer of 512
# and 3200, and the diffusion U-Net of (512, 1024, 2048), are for a GPU: smaller ones make more steps in the time.
# LeRobot's diffusion denoises in 100 steps by default: DDIM in 10, its own choice of a faster one, as ours does it.
SIZES = {
    "act": {
        "chunk_size": 20,
        "n_action_steps": 8,
        "pretrained_backbone_weights": None,
        "optimizer_lr": 1e-4,
        "optimizer_lr_backbone": 1e-4,
        "dim_model": 256,
        "dim_feedforward": 1024,
    },
    "diffusion": {"down_dims": (128, 256, 512), "noise_scheduler_type": "DDIM", "num_inference_steps": 10},
}


class Peer:
    def __init__(self, kind: str, root: Path):
        self.kind = kind
        meta = LeRobotDataset("local/train", root=root).meta
        features = dataset_to_policy_features(meta.features)
        seen = {name: one for name, one in features.items() if one.type in (FeatureType.STATE, FeatureType.VISUAL)}
        seen.pop("observation.force", None)  # neither policy has an input for it
        config = make_policy_config(kind, device="cpu", push_to_hub=False, **SIZES[kind])
        config.input_features, config.output_features = seen, {"action": features["action"]}
        for name in meta.camera_keys:  # as LeRobot's training does
            meta.stats[name] |= {key: np.array(value, np.float32) for key, value in IMAGENET_STATS.items()}
        self.config, self.cameras = config, list(config.image_features)
        self.policy = {"act": ACTPolicy, "diffusion": DiffusionPolicy}[kind](config)
        self.before, self.after = make_pre_post_processors(config, dataset_stats=meta.stats)
        self.times = resolve_delta_timestamps(config, meta)

    def data(self, root: Path) -> LeRobotDataset:
        return LeRobotDataset("local/data", root=root, delta_timestamps=self.times)

    def loader(self, root: Path) -> torch.utils.data.DataLoader:
        data, kept = self.data(root), getattr(self.config, "drop_n_last_frames", 0)
        begins, ends = (data.meta.episodes[f"dataset_{side}_index"] for side in ("from", "to"))
        sampler = EpisodeAwareSampler(begins, ends, drop_n_last_frames=kept, shuffle=True)
        return torch.utils.data.DataLoader(data, BATCH, sampler=sampler, drop_last=True)

    def train(self, root: Path, seconds: float) -> dict:
        torch.manual_seed(0)
        preset, loader = self.config.get_optimizer_preset(), self.loader(root)
        optimizer = preset.build(self.policy.get_optim_params())
        schedule, scheduler = self.config.get_scheduler_preset(), None
        if schedule:
            schedule.num_warmup_steps = TICKS // 10
            scheduler = schedule.build(optimizer, TICKS)
        begin, steps, epochs, losses = time.process_time(), 0, 0, []
        self.policy.train()
        while time.process_time() - begin < seconds:
            epochs += 1
            for batch in loader:
                loss, _ = self.policy.forward(self.before(batch))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), preset.grad_clip_norm)
                optimizer.step()
                optimizer.zero_grad()
                steps, losses = steps + 1, [*losses[-99:], loss.item()]
                spent = time.process_time() - begin
                while scheduler and scheduler.last_epoch < min(1.0, spent / seconds) * TICKS:
                    scheduler.step()
                if spent >= seconds:
                    break
        parameters = sum(one.numel() for one in self.policy.parameters())
        found = {"steps": steps, "epochs": epochs, "parameters": parameters, "loss": float(np.mean(losses))}
        return found | {"cpu_s": time.process_time() - begin, "batch": BATCH}

    @torch.no_grad()
    def chunk(self, batch: dict) -> torch.Tensor:
        """(B, H, 7) actions from the current step on; of the last observations (diffusion: two)."""
        self.policy.eval()
        batch = self.before({name: batch[name] for name in ("observation.state", *self.cameras)})
        if self.kind == "act":
            return self.after(self.policy.predict_action_chunk(batch))
        pictures = torch.stack([batch[name] for name in self.cameras], dim=-4)
        given = {"observation.state": batch["observation.state"], "observation.images": pictures}
        return self.after(self.policy.diffusion.generate_actions(given))

    def ask(self, root: Path, folder: Path) -> dict:
        data, rows = self.data(root), []
        few = range(0, len(data), -(-len(data) // MOST_ASKED))
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, few), BATCH)
        for batch in loader:
            skip = self.config.n_obs_steps - 1
            target, padded = batch["action"][:, skip:], batch["action_is_pad"][:, skip:]
            rows.append([one.numpy() for one in (self.chunk(batch)[:, :8], target[:, :8], ~padded[:, :8])])
        names = ("predicted", "target", "mask")
        np.savez(
            folder / "asked.npz",
            **{n: np.concatenate(one) for n, one in zip(names, zip(*rows, strict=True), strict=True)},
        )
        return {"frames": len(few)}

    def serve(self) -> None:
        """state (2, 12) float32 and pictures (views, 2, H, W, 3) uint8, the newest last -> chunk (H, 7) float32."""
        source, sink = sys.stdin.buffer, sys.stdout.buffer
        many = self.config.n_obs_steps
        while head := source.read(8):  # how many bytes of a .npz follow
            given = np.load(io.BytesIO(source.read(int.from_bytes(head, "little"))), allow_pickle=False)
            state, pictures = given["state"], given["pictures"]
            seen = {"observation.state": torch.from_numpy(state[-many:])[None]}
            for camera, one in zip(self.cameras, pictures, strict=True):
                shown = torch.from_numpy(one[-many:].astype(np.float32) / 255).permute(0, 3, 1, 2)
                seen[camera] = shown[None]
            if self.kind == "act":
                seen = {name: one[:, 0] for name, one in seen.items()}
            answer = io.BytesIO()
            np.save(answer, self.chunk(seen)[0].float().numpy())
            sink.write(answer.tell().to_bytes(8, "little") + answer.getvalue())
            sink.flush()


def main(kind: str, what: str, train: Path, folder: Path, given: str) -> dict | None:
    torch.set_num_threads(1)
    peer, weights = Peer(kind, train), folder / "weights.pt"
    if what == "train":
        found = peer.train(train, float(given))
        torch.save(peer.policy.state_dict(), weights)
        return found
    if what == "loader":
        loader, begin = iter(peer.loader(train)), time.process_time()
        for _ in range(int(given)):
            next(loader)
        return {"samples_per_s": int(given) * BATCH / (time.process_time() - begin)}
    peer.policy.load_state_dict(torch.load(weights, weights_only=True))
    return peer.serve() if what == "serve" else peer.ask(Path(given), folder)


if __name__ == "__main__":
    kind, what, train, folder, given = sys.argv[1:]
    found = main(kind, what, Path(train), Path(folder), given)
    if found is not None:
        print(json.dumps(found))
