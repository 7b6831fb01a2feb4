"""What others state about themselves, to stand beside predictions and measurements."""

from shapes import Shape

# SonicMoE on an H100 SXM, bf16, forward and backward, in TFLOP/s of 6 T I H K and twice that: read off the pixels of
# assets/tput.png of Dao-AILab/sonic-moe (8565e84; arXiv 2512.14080, figure 13), good to some 5 TFLOP/s.
SONICMOE = {
    Shape("1.4B", 40960, 768, 256, 128, 8): (337, 365),
    Shape("1.4B", 40960, 768, 512, 64, 4): (397, 403),
    Shape("1.4B", 40960, 768, 1024, 32, 2): (404, 434),
    Shape("7B", 24576, 1536, 256, 128, 8): (363, 404),
    Shape("7B", 24576, 1536, 512, 64, 4): (434, 438),
    Shape("7B", 24576, 1536, 1024, 32, 2): (466, 466),
    Shape("30B", 32768, 4096, 256, 256, 16): (427, 459),
    Shape("30B", 32768, 4096, 512, 128, 8): (502, 511),
    Shape("30B", 32768, 4096, 1024, 64, 4): (552, 554),
    Shape("120B", 32768, 4096, 512, 256, 16): (517, 526),
    Shape("120B", 32768, 4096, 1024, 128, 8): (558, 567),
    Shape("120B", 32768, 4096, 2048, 64, 4): (595, 586),
}
# Liger-Kernel pull request 1294, H100, forward alone and forward with backward: TFLOP/s in Triton.
LIGER = {Shape("qwen3-30b", 32768, 2048, 768, 128, 8): (523, 413)}
