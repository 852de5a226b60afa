export const words = {
  en: {
    title: "history", checkpoints: "checkpoints", parameters: "parameters", loading: "Loading …", failed: "This failed", step: "step", tokens: "tokens",
    curves: "Curves", loss: "loss (nats a token)", bits: "held-out bits a byte", rate: "learning rate", at: "Checkpoint", with: "Compare with", none: "none",
    keys: "Arrow keys move by one checkpoint, Page keys by ten, Home and End to the ends.", slider: "Step", samples: "Samples", made: "made at step", make: "Generate from these weights",
    making: "Generating …", nothing: "The run kept none up to here.", layers: "Layers", norm: "norm", change: "update size", cosine: "1 − cosine", norms: "Norm", changes: "Update size: ‖this − previous‖ / ‖this‖",
    cosines: "1 − cosine to the previous checkpoint", low: "low", high: "high", layer: "layer", branches: "Branches", began: "began at step", reaches: "reaches step", manifest: "Manifest",
    stage: "stage", lr: "lr", train: "loss", bytes: "bytes", seed: "seed", parent: "parent", hash: "manifest SHA-256", tensors: "tensors", batch: "batch (sequences)", computed: "computed", this: "this run",
    scores: "Scores", error: "± standard error", warmup: "warm-up", stable: "stable", decay: "decay", tail: "tail",
  },
  zh: {
    title: "训练历史", checkpoints: "个检查点", parameters: "参数", loading: "加载中…", failed: "出错了", step: "步", tokens: "词元",
    curves: "曲线", loss: "损失（奈特/词元）", bits: "留出集 比特/字节", rate: "学习率", at: "检查点", with: "对比", none: "无",
    keys: "方向键移动一个检查点，翻页键移动十个，Home/End 到两端。", slider: "步数", samples: "样本", made: "生成于第", make: "用此权重生成",
    making: "生成中…", nothing: "到此为止没有保存样本。", layers: "各层", norm: "范数", change: "更新大小", cosine: "1 − 余弦", norms: "范数", changes: "更新大小：‖当前 − 前一个‖ / ‖当前‖",
    cosines: "1 − 与前一检查点的余弦", low: "低", high: "高", layer: "层", branches: "分支", began: "起始步", reaches: "到达步", manifest: "清单",
    stage: "阶段", lr: "学习率", train: "损失", bytes: "字节", seed: "种子", parent: "来源", hash: "清单 SHA-256", tensors: "张量", batch: "批大小（序列）", computed: "已计算", this: "本运行",
    scores: "评测", error: "± 标准误", warmup: "预热", stable: "稳定", decay: "衰减", tail: "尾段",
  },
};
export type Words = (typeof words)["en"];
