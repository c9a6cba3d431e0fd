import pathlib,sys
S=pathlib.Path('libetap/src/sm90')
def sub(f,a,b,n=1,root=S):
    t=(root/f).read_text(); assert t.count(a)>=1,(f,a); assert n==0 or t.count(a)==n,(f,a,t.count(a)); (root/f).write_text(t.replace(a,b))
f='kernels/rows_on_m.cuh'
sub(f,'enum : int { kBarrierRows = 2 };','''__device__ __forceinline__ void tick(const DecodeParams &p, int who, int by, int nth, int stage) {
  if (static_cast<int>(threadIdx.x) == by && nth >= 4 && nth < 14) {
    uint32_t c;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(c)::"memory");
    uint32_t *const at = reinterpret_cast<uint32_t *>(p.partials) + 16;
    at[blockIdx.x * 240 + who * 80 + (nth - 4) * 8 + stage] = c;
    if (blockIdx.x == 0) {
      reinterpret_cast<uint32_t *>(p.partials)[0] = 0x13579bdfu;
      reinterpret_cast<uint32_t *>(p.partials)[1] = 0x2468ace0u;
    }
  }
}
enum : int { kBarrierRows = 2 };''')
sub(f,'''  __device__ __forceinline__ int tokens_of(int block) const {''','''  __device__ __forceinline__ void at(int block, int stage) const { tick(p, W, 128 + 128 * W, block - context.piece.block_begin, stage); }
  __device__ __forceinline__ int tokens_of(int block) const {''')
sub(f,'''    mbarrier_wait(smem_address(&shared.p_ready[slot]), parity >> slot & 1);
    if constexpr (K::COPY''','''    at(W == 1 ? block + 1 : block, 5);
    mbarrier_wait(smem_address(&shared.p_ready[slot]), parity >> slot & 1);
    at(W == 1 ? block + 1 : block, 6);
    if constexpr (K::COPY''')
sub(f,'''    if (lane() == 0) mbarrier_arrive(smem_address(&shared.p_ready[W]));
    if constexpr''','''    if (lane() == 0) mbarrier_arrive(smem_address(&shared.p_ready[W]));
    at(block, 3);
    if constexpr''')
sub(f,'''    release(W, W);
    parity ^= 1u << W;''','''    at(block, 4);
    release(W, W);
    parity ^= 1u << W;''')
t=(S/f).read_text()
t=t.replace('''        math.multiply_keys(other, exists(next(block)));
        wgmma_wait<0>();
        wgmma_fence_registers(math.S);
''','''        math.at(block, 0);
        math.multiply_keys(other, exists(next(block)));
        math.at(block, 1);
        wgmma_wait<0>();
        wgmma_fence_registers(math.S);
        math.at(block, 2);
''')
t=t.replace('''        math.multiply_keys(false, false);
        math.begin_other(last());
''','''        math.at(block, 0);
        math.multiply_keys(false, false);
        math.at(block, 1);
        math.begin_other(last());
        math.at(block, 2);
''')
(S/f).write_text(t)
f='parts/e4m3_widen.cuh'
sub(f,"""    for (int nth = 0; nth < UNITS; ++nth) {
      constexpr int kFirst""","""    for (int nth = 0; nth < UNITS; ++nth) {
      const int number = cur - p.records[blockIdx.x].block_begin;
      constexpr int kFirst""")
sub(f,"""  __device__ __forceinline__ void bring_block(uint32_t parity) {
""","""  __device__ __forceinline__ void bring_block(uint32_t parity) {
    const int cur = loading;
""")
sub(f,"""        mbarrier_wait(smem_address(&shared.empty[SLOT][part]), parity);
""","""      {
        tick(p, 2, 0, number, nth == 0 ? 0 : nth > UNITS / 2 ? 4 : 2);
        mbarrier_wait(smem_address(&shared.empty[SLOT][part]), parity);
        tick(p, 2, 0, number, nth == 0 ? 1 : nth > UNITS / 2 ? 5 : 3);
      }
""")
sub(f,"""      if (nth == kLast) {
        loading""","""      if (nth == UNITS - 1) tick(p, 2, 0, number, 6);
      if (nth == kLast) {
        loading""")
# tick before namespace use: move into piece.cuh
a=(S/'kernels/rows_on_m.cuh').read_text()
i=a.index('__device__ __forceinline__ void tick'); j=a.index('enum : int { kBarrierRows = 2 };')
fn=a[i:j]; a=a[:i]+a[j:]; (S/'kernels/rows_on_m.cuh').write_text(a)
sub('parts/piece.cuh','enum : int { kBarrierConsumers',fn+'enum : int { kBarrierConsumers')
