"""Writes clock reads into rows_on_m.cuh of the tree it runs in: of QK (who 0) before QK, after its last issue, when S is there, when PV of the block before the last was done, when P
is stored; of PV left and right (1, 2) before P, with it, all issued, first pair done, second pair done. Blocks 4 .. 13 of a piece."""
import pathlib
S = pathlib.Path('libetap/src/sm90')
f = S / 'kernels/rows_on_m.cuh'
t = f.read_text()
def sub(a, b, n=1):
    global t
    assert t.count(a) == n, (a, t.count(a))
    t = t.replace(a, b)
sub('enum : int { kBarrierRows = 2 };', '''__device__ __forceinline__ void tick(const DecodeParams &p, int who, int by, int nth, int stage) {
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
sub('''        multiply_keys(slot);
''', '''        at = block - context.piece.block_begin;
        tick(p, 0, 384, at, 0);
        multiply_keys(slot);
        tick(p, 0, 384, at, 2);
''')
sub('''        settle(context, block);
      }''', '''        settle(context, block);
        tick(p, 0, 384, at, 4);
      }''')
sub('''  bool waiting;                       // does''', '''  int at;
  bool waiting;                       // does''')
sub('''    wgmma_commit();
    wgmma_wait<0>();
    wgmma_fence_registers(S);
''', '''    wgmma_commit();
    tick(p, 0, 384, at, 1);
    wgmma_wait<0>();
    wgmma_fence_registers(S);
''')
sub('''      settled = false;
      waiting = true;
''', '''      settled = false;
      waiting = true;
      tick(p, 0, 384, at, 3);
''')
V = '128 + 128 * half()'
sub('''    mbarrier_wait(smem_address(shared.p_ready, buffer), state >> 1 & 1);
''', '''    tick(p, 1 + half(), 128 + 128 * half(), at, 0);
    mbarrier_wait(smem_address(shared.p_ready, buffer), state >> 1 & 1);
    tick(p, 1 + half(), 128 + 128 * half(), at, 1);
''')
sub('''      wgmma_wait_until(K::HALF_PAIRS - 1 - nth);
''', '''      if (nth == 0) tick(p, 1 + half(), 128 + 128 * half(), at, 2);
      wgmma_wait_until(K::HALF_PAIRS - 1 - nth);
      tick(p, 1 + half(), 128 + 128 * half(), at, 3 + nth);
''')
sub('void add_values(uint32_t state, int slot, int tokens) {', 'void add_values(uint32_t state, int slot, int tokens, int at) {')
sub('add_values(state, slot, shared.kv_end - block * kBlockTokens);', 'add_values(state, slot, shared.kv_end - block * kBlockTokens, block - context.first_block());')
f.write_text(t)
