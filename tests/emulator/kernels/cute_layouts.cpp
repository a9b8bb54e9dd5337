// Prints CuTe's layouts of the instructions in isa.cuh: per operand, for each thread and value, the element's index.
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

template <class Layout>
void print(const char* name, const char* operand, Layout const& layout, int step) {
  std::printf("%s %s", name, operand);
  for (int thread = 0; thread < 32; ++thread) {
    for (int value = 0; value < int(cute::size<1>(layout)); value += step) {
      std::printf(" %d", int(layout(thread, value)) / step);
    }
  }
  std::printf("\n");
}

template <class Operation>
void print_mma(const char* name) {
  using Traits = cute::MMA_Traits<Operation>;
  print(name, "a", typename Traits::ALayout{}, 1);
  print(name, "b", typename Traits::BLayout{}, 1);
  print(name, "c", typename Traits::CLayout{}, 1);
}

// These layouts count bits; elements have 16.
template <class Operation>
void print_copy(const char* name) {
  using Traits = cute::Copy_Traits<Operation>;
  print(name, "source", typename Traits::SrcLayout{}, 16);
  print(name, "destination", typename Traits::DstLayout{}, 16);
}

int main() {
  print_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("mma_half");
  print_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("mma_bfloat16");
  print_mma<cute::SM80_16x8x8_F32TF32TF32F32_TN>("mma_tf32");
  print_copy<cute::SM75_U32x2_LDSM_N>("ldmatrix_x2");
  print_copy<cute::SM75_U16x4_LDSM_T>("ldmatrix_x2_trans");
  print_copy<cute::SM75_U32x4_LDSM_N>("ldmatrix_x4");
  print_copy<cute::SM75_U16x8_LDSM_T>("ldmatrix_x4_trans");
}
