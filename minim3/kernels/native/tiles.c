/* Permission for tiles, whose state is large: Linux saves it for processes that ask. */
#include "tiles.h"

#if HAVE_TILES
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18
#endif

int minim3_tiles = 0;

/* Whether products run on tiles from now on: where they are compiled, wanted, and the system allows it. */
int minim3_use_tiles(int wanted) {
#if HAVE_TILES
    minim3_tiles = wanted && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    (void)wanted;
#endif
    return minim3_tiles;
}
